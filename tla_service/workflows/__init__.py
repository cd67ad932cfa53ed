"""Workflows: what needs Ray and MLflow together."""
