"""Speed of the training step: compared with its theoretical cost, with single optimizations off, and with other libraries."""
