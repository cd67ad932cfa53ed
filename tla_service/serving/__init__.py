"""Serving a registered version over HTTP with Ray Serve: batched, with health and metrics."""
