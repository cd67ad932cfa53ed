"""Evaluation: accuracy under attack, and the pictures of a run."""
