"""MLflow tracking: connections, runs and metrics that survive an absent server."""
