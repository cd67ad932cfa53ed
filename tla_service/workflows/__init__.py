"""Whole jobs: what needs both Ray and MLflow."""
