"""Tests a tracking store: creates a run, writes to it, and deletes it."""

import tempfile
import time
from pathlib import Path

from tla_service.config import TrackingConfig
from tla_service.errors import UnavailableError
from tla_service.tracking.connection import FIELD, check_tracking, client, experiment_id, tracking_uri
from tla_service.tracking.store_errors import artifact_cause


def probe_tracking(config: TrackingConfig) -> float:
    """Create a run with a metric and a file, read the file back, and delete the run; returns the seconds it took."""
    check_tracking(config)
    uri = tracking_uri(config)
    began = time.perf_counter()
    made = client(uri)
    run_id = made.create_run(experiment_id(made, config.experiment, uri), run_name="checkup").info.run_id
    try:
        made.log_metric(run_id, "checkup", 1.0)
        made.log_text(run_id, "ok", "checkup.txt")
        with tempfile.TemporaryDirectory() as folder:
            text = Path(made.download_artifacts(run_id, "checkup.txt", folder)).read_text()
    except Exception as error:
        location = str(made.get_run(run_id).info.artifact_uri)
        raise UnavailableError(FIELD, uri, *artifact_cause(location, error)) from error
    finally:
        made.delete_run(run_id)
    if text != "ok":
        reason = "returns a different file than was stored"
        raise UnavailableError(FIELD, uri, reason, "check the server's artifact store")
    return time.perf_counter() - began
