"""The application on a real Ray Serve: answers, batches, bad requests, metrics.

`pytest -m slow tests/serving/test_app.py`
"""

import asyncio
import base64
import json
import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from starlette.requests import Request

from tests.inference.files import encoded
from tests.registry.tracking_server import Packaged
from tests.serving.test_bodies import npy
from tla_service.errors import ConfigError
from tla_service.tracking.connection import client

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # Ray Serve warns of its own use of pydantic and of its sockets
]
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    made = Packaged(f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db")
    client(made.uri).set_registered_model_alias("tla-digits", "champion", "1")
    return made


@pytest.fixture(scope="module")
def address(packaged: Packaged) -> Iterator[str]:
    import ray
    from ray import serve

    from tla_service.serving.app import app

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = {"model": "models:/tla-digits@champion", "tracking_uri": packaged.uri}
    limits = {"max_batch_images": 16, "max_request_images": 40, "max_request_bytes": 200_000}
    serve.run(app(arguments | limits))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def call(url: str, body: bytes | None = None, kind: str = "application/json") -> tuple[int, Any]:
    request = urllib.request.Request(url, body, {"Content-Type": kind} if body is not None else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            status, text = answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode()
    return status, json.loads(text) if text.startswith("{") else text


def check(answer: dict[str, Any], packaged: Packaged, pixels: np.ndarray) -> None:
    expected = torch.softmax(packaged.logits(pixels.astype(np.float32) / 255), dim=1).numpy()
    np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-5)
    assert answer["label"] == expected.argmax(1).tolist()
    assert answer["class"] == [f"digit {label}" for label in answer["label"]]
    assert answer["model"] == "models:/tla-digits/1"
    assert len(answer["accepted"]) == len(answer["detection_score"]) == len(pixels)


def test_it_says_what_it_serves(address: str) -> None:
    status, facts = call(address)
    assert (status, facts["model"], facts["image_shape"]) == (200, "models:/tla-digits/1", [1, 8, 8])
    assert call(f"{address}/health")[1]["status"] == "ok"
    assert call(f"{address}/nowhere")[0] == 404


def test_every_form_is_answered(address: str, packaged: Packaged) -> None:
    texts = [base64.b64encode(encoded(image)).decode() for image in PIXELS[:3]]
    bodies = [
        (json.dumps({"images": PIXELS[:3].tolist()}).encode(), "application/json", 3),
        (json.dumps({"images": texts}).encode(), "application/json; charset=utf-8", 3),
        (npy(PIXELS), "application/x-npy", 40),
        (encoded(PIXELS[0]), "image/png", 1),
    ]
    for body, kind, count in bodies:
        status, answer = call(f"{address}/predict", body, kind)
        assert status == 200, answer
        check(answer, packaged, PIXELS[:count])
    answer = call(f"{address}/predict", json.dumps({"images": texts, "embedding": True}).encode())[1]
    assert np.array(answer["embedding"]).shape == (3, 128)


def test_many_at_once_get_their_own_answers(address: str, packaged: Packaged) -> None:
    parts = [PIXELS[start : start + 1 + start % 5] for start in range(35)] * 4
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda part: call(f"{address}/predict", npy(part), "application/x-npy"), parts))
    for part, (status, answer) in zip(parts, answers, strict=True):
        assert status == 200
        check(answer, packaged, part)


def test_bad_requests_are_explained_and_it_stays_up(address: str, packaged: Packaged, tmp_path: Path) -> None:
    jpeg = encoded(PIXELS[0], "JPEG")
    unit = PIXELS[:1].astype(np.float32) / 255
    bad = [
        (npy(unit[:, :, :4]), "application/x-npy", 400, "shape (1, 1, 4, 8)"),
        (npy(unit * np.nan), "application/x-npy", 400, "NaN"),
        (npy(unit + 1), "application/x-npy", 400, "range over"),
        (npy(unit[:0]), "application/x-npy", 400, "no images"),
        (npy(np.zeros((41, 1, 8, 8), np.uint8)), "application/x-npy", 400, "at most 40"),
        (jpeg[: len(jpeg) // 2], "image/jpeg", 400, "image 0 is"),
        (b"hello", "image/png", 400, "no PNG or JPEG"),
        (b"{", "application/json", 400, "not JSON"),
        (b"hello", "text/plain", 415, "send application/json"),
        (b"x" * 300_000, "application/x-npy", 413, "exceeds 200000 bytes"),
    ]
    for body, kind, expected, words in bad:
        status, answer = call(f"{address}/predict", body, kind)
        assert (status, words in answer["error"]) == (expected, True), answer
    status, answer = call(f"{address}/predict", npy(PIXELS[:2]), "application/x-npy")
    assert status == 200
    check(answer, packaged, PIXELS[:2])


def test_metrics_count_what_was_answered(address: str) -> None:
    def figure(name: str) -> float:
        lines = call(f"{address}/metrics")[1].splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    before = figure('tla_serve_requests_total{status="200"}'), figure("tla_serve_images_total")
    call(f"{address}/predict", npy(PIXELS[:7]), "application/x-npy")
    assert figure('tla_serve_requests_total{status="200"}') == before[0] + 1
    assert figure("tla_serve_images_total") == before[1] + 7
    assert figure('tla_serve_requests_total{status="415"}') >= 1
    assert figure('tla_serve_model{uri="models:/tla-digits/1"}') == 1


def test_an_error_is_counted_as_500() -> None:
    from tla_service.serving.app import Classifier

    class Broken(Classifier.func_or_class):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            self._meter = Mock()

        async def _predict(self, _: Request) -> Any:
            raise RuntimeError("out of memory")

    broken = Broken()
    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(broken(Request({"type": "http", "method": "POST", "path": "/predict", "headers": []})))
    ((status, _, accepted, rejected), _) = broken._meter.count.remote.call_args
    assert (status, accepted, rejected) == (500, 0, 0)


def test_wrong_settings_and_missing_models_are_refused(packaged: Packaged) -> None:
    from tla_service.serving.app import app

    with pytest.raises(ConfigError, match="replicas=0"):
        app({"model": "models:/tla-digits/1", "replicas": 0})
    with pytest.raises(ConfigError, match="names no version"):
        app({"model": "runs:/x/model", "tracking_uri": packaged.uri})
