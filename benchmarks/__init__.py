"""Speed of the training step, compared with its theoretical cost, other libraries, and each optimization switched off."""
