"""The Ray Serve application: replicas that classify, and one that collects metrics."""

import asyncio
import time
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from tla_service.config import TrackingConfig
from tla_service.config.explain import validated
from tla_service.inference.images import BadImages
from tla_service.registry.loading import open_package, pin_version
from tla_service.serving.bodies import ENCODED, JSON, NPY, parse_body
from tla_service.serving.settings import ServeSettings
from tla_service.tracking.connection import tracking_uri

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
_FACTS = ("architecture", "method", "threat_model", "class_names", "image_shape", "detector")


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000)
class Meter:
    """Metrics of all replicas that serve one model version, in Prometheus' text format."""

    def __init__(self, model: str) -> None:
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
        return generate_latest(self._registry).decode()


@serve.deployment
class Classifier:
    """A replica of ``model`` (``models:/NAME/VERSION``), from the registry at ``uri``."""

    def __init__(self, settings: ServeSettings, model: str, uri: str, meter: "DeploymentHandle[Any]") -> None:
        from tla_service.inference.predictor import Predictor  # imports torch, which only replicas need

        self._settings, self._model, self._meter = settings, model, meter
        artifacts, self._description = open_package(model, uri)
        self._predictor = Predictor.load(artifacts, "cuda" if settings.gpus_per_replica else "cpu")
        self._classify.set_max_batch_size(settings.max_batch_images)  # type: ignore[attr-defined]
        self._classify.set_batch_wait_timeout_s(settings.batch_wait_seconds)  # type: ignore[attr-defined]

    async def __call__(self, request: Request) -> Response:
        """Handle a request."""
        route = f"{request.method} {request.url.path.rstrip('/') or '/'}"
        if route == "GET /":
            facts = {name: self._description[name] for name in _FACTS}
            sha256 = self._description["weights"]["sha256"]
            return JSONResponse({"model": self._model, **facts, "weights_sha256": sha256})
        if route == "GET /health":
            return JSONResponse({"status": "ok", "model": self._model})
        if route == "GET /metrics":
            return PlainTextResponse(await self._meter.text.remote(), media_type="text/plain; version=0.0.4")
        if route != "POST /predict":
            available = "GET /, /health, /metrics and POST /predict"
            return JSONResponse({"error": f"not found; available: {available}"}, status_code=404)
        began = time.perf_counter()
        accepted = rejected = 0
        try:
            answer, accepted, rejected = await self._predict(request)
            status = 200
        except HTTPException as error:
            answer, status = {"error": error.detail}, error.status_code
        except Exception:  # Ray Serve logs it, and responds
            self._meter.count.remote(500, time.perf_counter() - began, 0, 0)
            raise
        self._meter.count.remote(status, time.perf_counter() - began, accepted, rejected)
        return JSONResponse(answer, status_code=status)

    async def _predict(self, request: Request) -> tuple[dict[str, Any], int, int]:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type not in (JSON, NPY, *ENCODED):
            raise HTTPException(415, f"send {', '.join((JSON, NPY, *ENCODED))}, not {content_type or 'nothing'}")
        body = await self._body(request)
        shape, most = self._predictor.image_shape, self._settings.max_request_images
        try:
            resize = self._predictor.resize
            images, embedding = await asyncio.to_thread(parse_body, body, content_type, shape, most, resize=resize)
        except BadImages as error:
            raise HTTPException(400, str(error)) from None
        # Each chunk fits into a batch; the batcher combines them again.
        size = self._settings.max_batch_images
        chunks = [images[start : start + size] for start in range(0, len(images), size)]
        parts = await asyncio.gather(*(self._classify(chunk) for chunk in chunks))
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if not embedding:
            del found["embedding"]
        rejected = int((~found["accepted"]).sum()) if "accepted" in found else 0
        names = [self._predictor.class_names[label] for label in found["label"]]
        answer = {"model": self._model, "class": names, **{name: found[name].tolist() for name in found}}
        return answer, len(images) - rejected, rejected

    async def _body(self, request: Request) -> bytes:
        """The body, limited in size whatever Content-Length says."""
        limit, body = self._settings.max_request_bytes, bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise HTTPException(413, f"the body exceeds {limit} bytes; send the images in several requests")
        return bytes(body)

    @serve.batch(batch_size_fn=lambda batch: sum(len(images) for images in batch))
    async def _classify(self, batch: list[np.ndarray]) -> list[dict[str, np.ndarray]]:
        """Classify the images of several requests in a thread, so that the event loop accepts more."""
        found = await asyncio.to_thread(self._predictor.predict, np.concatenate(batch), embedding=True)
        ends = np.cumsum([len(images) for images in batch])
        return [
            {name: values[end - len(images) : end] for name, values in found.items()}
            for images, end in zip(batch, ends, strict=True)
        ]


def app(arguments: dict[str, Any]) -> Application:
    """The application for the ``args`` of Serve's configuration.

    An alias is resolved once, here, so that replicas started later serve the same version. Serve calls this
    again only for other arguments: to follow the alias, deploy with the number of the version. Raises `UserError`
    for an invalid field or address, a version that does not exist and an unavailable registry.
    """
    settings = validated(ServeSettings, arguments)
    uri = tracking_uri(TrackingConfig(uri=settings.tracking_uri))
    model = pin_version(settings.model, uri)
    classifier = Classifier.options(  # type: ignore[attr-defined]
        num_replicas=settings.replicas,
        ray_actor_options={"num_cpus": settings.cpus_per_replica, "num_gpus": settings.gpus_per_replica},
        max_queued_requests=settings.max_waiting_requests,
        max_ongoing_requests=2 * settings.max_batch_images,
    )
    return classifier.bind(settings, model, uri, Meter.bind(model))  # type: ignore[attr-defined]
