"""Measure latency and throughput of a served model over HTTP, with real clients in threads of this process.

python -m benchmarks.serving --model models:/tla-digits@champion
python -m benchmarks.serving --address http://host:8000 --clients 1 16 --images 1 64

Without an address the model is served from this machine for the time of the measurement.
"""

import argparse
import contextlib
import http.client
import io
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np

from benchmarks.results import markdown
from tla_service.config import TrackingConfig
from tla_service.errors import ConfigError, UnavailableError
from tla_service.job import run_job
from tla_service.tracking.connection import tracking_uri

_WARM_UP_SHARE = 0.2  # of the time, before it
_COLUMNS = ["clients", "images per request", "p50", "p95", "p99", "requests/s", "images/s"]


@contextlib.contextmanager
def local_service(model: str, tracking_uri: str, port: int, max_batch_images: int) -> Iterator[str]:
    """Serve a model on a local Ray cluster for the duration of the block; yields its address."""
    import ray
    from ray import serve

    from tla_service.serving.app import app

    ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        arguments = {"model": model, "tracking_uri": tracking_uri, "max_batch_images": max_batch_images}
        serve.run(app(arguments))
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def image_shape(address: str) -> tuple[int, ...]:
    """Input of the served model.

    Raises:
        UnavailableError: Nothing answers.
    """
    import json
    import urllib.request

    try:
        with urllib.request.urlopen(address, timeout=30) as answer:  # an http:// address of the user's
            return tuple(json.load(answer)["image_shape"])
    except (OSError, ValueError, KeyError) as error:
        raise UnavailableError("address", address, f"no model answers ({error})", "start the application") from error


def measure(address: str, clients: int, images: int, seconds: float) -> list[str]:
    """A row of `_COLUMNS`: requests are sent, each client's one after another, and answers timed after a warm-up.

    Raises:
        UnavailableError: A request was not answered with 200.
    """
    random = np.random.default_rng(0)
    stream = io.BytesIO()
    np.save(stream, random.integers(0, 256, (images, *image_shape(address)), dtype=np.uint8))
    body = stream.getvalue()
    begin = time.perf_counter()
    counting, end = begin + _WARM_UP_SHARE * seconds, begin + (1 + _WARM_UP_SHARE) * seconds

    def client(_: int) -> list[float]:
        connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
        taken = []
        while (asked := time.perf_counter()) < end:
            connection.request("POST", "/predict", body, {"Content-Type": "application/x-npy"})
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise UnavailableError("address", address, f"{answer.status} {text[:200]!r}", "look into Serve's log")
            done = time.perf_counter()
            if asked >= counting:
                taken.append(done - asked)
        return taken

    with ThreadPoolExecutor(clients) as pool:
        taken = np.concatenate(list(pool.map(client, range(clients))))
    if not len(taken):
        raise UnavailableError("address", address, f"no answer within {seconds:g} s", "give --seconds more")
    latencies = [f"{1000 * value:.1f} ms" for value in np.quantile(taken, [0.5, 0.95, 0.99])]
    rate = len(taken) / seconds
    return [str(clients), str(images), *latencies, f"{rate:.0f}", f"{rate * images:.0f}"]


def main() -> int:
    """Measure each load, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="registered model to serve: models:/NAME@ALIAS or models:/NAME/N")
    parser.add_argument("--address", default="", help="address of a running application, in place of a model")
    parser.add_argument("--tracking-uri", help="registry; default: MLFLOW_TRACKING_URI, else mlflow.db here")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8], help="concurrent requests")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 64], help="images per request")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement, after a warm-up")
    parser.add_argument("--batch", type=int, default=64, help="max_batch_images of the served model")
    parser.add_argument("--port", type=int, default=8000, help="where to serve the model")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args()
    if bool(options.model) == bool(options.address):
        raise ConfigError("model", options.model, "a model or an address is needed", "give --model or --address")
    uri = tracking_uri(TrackingConfig(uri=options.tracking_uri))
    with contextlib.ExitStack() as stack:
        local = local_service(options.model, uri, options.port, options.batch) if options.model else None
        address = stack.enter_context(local) if local is not None else options.address
        pairs = [(clients, images) for images in options.images for clients in options.clients]
        rows = [measure(address, clients, images, options.seconds) for clients, images in pairs]
    print("\n".join(markdown(_COLUMNS, rows)))
    print(f"\nOn {os.cpu_count()} CPU cores ({platform.machine()}), clients included.")
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
