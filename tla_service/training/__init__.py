"""Training: one batch (`step`), one run (`fit`), checkpoints and progress."""
