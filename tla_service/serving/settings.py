"""Settings of the serving application: the ``args`` in Serve's configuration."""

from tla_service.config.fields import Section, setting


class ServeSettings(Section):
    """A model over HTTP."""

    model: str = setting("", "registered model: models:/NAME@ALIAS or models:/NAME/VERSION", min_length=1)
    tracking_uri: str | None = setting(None, "registry; none: MLFLOW_TRACKING_URI, else an SQLite file mlflow.db here")
    replicas: int = setting(1, "number of model replicas", ge=1)
    cpus_per_replica: float = setting(1, "CPU cores reserved per replica", unit="cores", gt=0)
    gpus_per_replica: float = setting(0, "GPU share reserved per replica", unit="GPUs", ge=0)
    max_batch_images: int = setting(64, "maximum images per batch, across requests", unit="images", ge=1)
    batch_wait_seconds: float = setting(0.005, "how long a batch waits for more images", unit="seconds", ge=0)
    max_request_images: int = setting(1000, "maximum images per request", unit="images", ge=1)
    max_request_bytes: int = setting(64_000_000, "maximum size of a request body", unit="bytes", ge=1)
    max_waiting_requests: int = setting(
        200, "maximum requests queued for the replicas; further ones are answered 503 at once", ge=1
    )
