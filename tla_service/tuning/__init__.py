"""Sweeps: what is searched, what is tried next, what is stopped early, what came out. Without Ray and MLflow."""
