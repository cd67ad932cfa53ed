"""Metrics of all replicas in one place, in Prometheus' text format."""

from ray import serve

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
class Meter:
    """Aggregates the counts of the replicas that serve one model version."""

    def __init__(self, model: str) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        registry = self._registry = CollectorRegistry()
        self._requests = Counter("tla_serve_requests", "Responses by status", ["status"], registry=registry)
        self._images = Counter("tla_serve_images", "Images by the detector's verdict", ["verdict"], registry=registry)
        self._seconds = Histogram("tla_serve_seconds", "Latency of responses", buckets=_BUCKETS, registry=registry)
        Gauge("tla_serve_model", "The served version", ["uri"], registry=registry).labels(model).set(1)

    async def count(self, status: int, seconds: float, accepted: int, rejected: int) -> None:
        """Count a response."""
        self._requests.labels(str(status)).inc()
        self._seconds.observe(seconds)
        self._images.labels("accepted").inc(accepted)
        self._images.labels("rejected").inc(rejected)

    async def text(self) -> str:
        """All metrics."""
        from prometheus_client import generate_latest

        return generate_latest(self._registry).decode()
