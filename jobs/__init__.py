"""Scripts, one per user action."""
