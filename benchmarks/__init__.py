"""Speed of the training step, compared with its theoretical cost, other libraries, and fewer optimizations."""
