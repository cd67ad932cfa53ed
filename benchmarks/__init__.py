"""How fast the training step is: against the arithmetic, against itself without a part, against other libraries."""
