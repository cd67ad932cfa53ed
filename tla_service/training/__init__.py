"""Training: one batch (`step`), one run (`fit`), what is saved (`checkpoint`) and what is told (`reporting`)."""
