"""Measure latency and throughput of a served model.

python jobs/benchmark_serving.py --model models:/tla-digits@champion
python jobs/benchmark_serving.py --address http://host:8000 --clients 1 16 --images 1 64

Without an address the model is served from this machine for the time of the measurement.
"""

import argparse
import contextlib
import sys

from tla_service.config import TrackingConfig
from tla_service.errors import ConfigError
from tla_service.job import run_job


def main() -> int:
    """Measure each load, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="registered model to serve: models:/NAME@ALIAS or models:/NAME/N")
    parser.add_argument("--address", default="", help="address of a running application, in place of a model")
    parser.add_argument("--tracking-uri", help="registry; default: MLFLOW_TRACKING_URI, else mlflow.db here")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8], help="requests at a time")
    parser.add_argument("--images", type=int, nargs="+", default=[1, 64], help="images a request")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement, after a warm-up")
    parser.add_argument("--batch", type=int, default=64, help="max_batch_images of the served model")
    parser.add_argument("--port", type=int, default=8000, help="where to serve the model")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args()
    if bool(options.model) == bool(options.address):
        raise ConfigError("model", options.model, "a model or an address is needed", "give --model or --address")
    # Imported late: --help should not wait for ray.
    from tla_service.registry import tracking_uri
    from tla_service.serving.benchmark import local_service, measure, table

    uri = tracking_uri(TrackingConfig(uri=options.tracking_uri))
    with contextlib.ExitStack() as stack:
        local = local_service(options.model, uri, options.port, options.batch) if options.model else None
        address = stack.enter_context(local) if local is not None else options.address
        pairs = [(clients, images) for images in options.images for clients in options.clients]
        loads = [measure(address, clients, images, options.seconds) for clients, images in pairs]
    print(table(loads))
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
