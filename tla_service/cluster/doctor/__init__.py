"""Cluster health checks: what training needs is tested on every node, with a remedy for each failure."""
