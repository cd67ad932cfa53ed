"""Scripts, one for each thing a user does."""
