"""MLflow runs: created or resumed by their key, described, given files, and closed."""

import functools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, Run, RunTag

from tla_service.config import RunConfig
from tla_service.config.loading import to_yaml
from tla_service.errors import UnavailableError, UserError, one_line, readable, without_credentials
from tla_service.job import code_version, environment
from tla_service.tracking.connection import client, open_store, retrying, search_all, storing, unstorable

RUN_KEY = "tla.run_key"
FINGERPRINT = "data_fingerprint"  # fact: the digest of the data set
_RESUMED = "tla.resumed"
_PARAM_LENGTH, _TAG_LENGTH, _DIGEST_LENGTH = 6000, 8000, 36  # MLflow's limits
_SYSTEM_METRICS_SECONDS = 10.0
_log = logging.getLogger(__name__)


def open_run(
    config: RunConfig,
    run_key: str,
    *,
    facts: Mapping[str, str],
    parent_run_id: str | None = None,
    use_gpu: bool | None = None,
) -> str:
    """Create the MLflow run of a key, or resume it, and describe it.

    Every field of the configuration becomes a parameter, and ``config.yaml`` loads it again; facts become tags.
    MLflow's parameters are immutable, so a resumed run keeps its own; a configuration that differs (other workers,
    another name) is added as a file. With `use_gpu`, parameters left to `speed.mode` have the values that they take on
    such workers. Returns the MLflow run id.
    """
    on_workers = config if use_gpu is None else config.on_device(has_gpu=use_gpu)
    uri, made, experiment = open_store(config.tracking)
    tags = {name: without_credentials(value) for name, value in config.tracking.tags.items()}
    tags |= {f"tla.{name}": str(value)[:_TAG_LENGTH] for name, value in facts.items()}
    tags |= code_version() | {RUN_KEY: run_key, "tla.method": config.method, "tla.config_digest": config.digest}
    tags |= {} if parent_run_id is None else {"mlflow.parentRunId": parent_run_id}
    run = retrying("Opening the run", lambda: tagged_run(made, experiment, RUN_KEY, config.run_name, tags))
    run_id = str(run.info.run_id)
    # A run without parameters is new, or was left before it was described.
    count = int(run.data.tags.get(_RESUMED, "0")) + 1 if run.data.params else 0
    if count:
        retrying("Resuming the run", lambda: made.update_run(run_id, status="RUNNING"))
        retrying("Resuming the run", lambda: _set_tags(made, run_id, tags | {_RESUMED: str(count)}))
    try:
        retrying("Describing the run", lambda: _describe(made, run_id, config, on_workers, facts, count))
    except UserError:
        raise
    except Exception as error:
        # The first file is written here: a run whose results could not be stored does not start.
        raise unstorable(made, uri, run_id, error) from error
    return run_id


def tagged_run(made: MlflowClient, experiment: str, key: str, name: str, tags: dict[str, str]) -> Run:
    """The run whose tag `key` has this value; created with all tags if an earlier attempt did not.

    One process at a time: of two that create a run at once, each gets its own.
    """
    found = _find(made, experiment, key, tags[key])
    return found[0] if found else made.create_run(experiment, run_name=name, tags=tags)


def flatten(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values: strings unchanged, everything else as JSON (``null``, ``true``, ``[1, 2]``)."""
    for name, value in fields.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)


def run_page(uri: str, run_id: str) -> str:
    """The URL of a run's page on a server, or the command that shows it in a local store."""
    if not uri.startswith("http"):
        return f"run {run_id}, shown by: mlflow ui --backend-store-uri {without_credentials(uri)}"
    made = client(uri)
    experiment = retrying("Reading the run", lambda: made.get_run(run_id)).info.experiment_id
    return f"{without_credentials(uri)}/#/experiments/{experiment}/runs/{run_id}"


def log_files(uri: str, run_id: str, files: Mapping[str, Path]) -> None:
    """Store files (artifact path -> local file of that name) with a run; retries for minutes, as `storing`."""
    made = client(uri)
    for target, source in files.items():
        folder, _, name = target.rpartition("/")
        assert name == source.name  # MLflow names an artifact after its file
        storing(f"Storing {target}", functools.partial(made.log_artifact, run_id, str(source), folder or None))


def find_finished(config: RunConfig, run_key: str) -> str | None:
    """The finished MLflow run of a key, if there is one; of ``config``, only the tracking section is read."""
    _, made, experiment = open_store(config.tracking)
    found = retrying("Finding the run", lambda: _find(made, experiment, RUN_KEY, run_key))
    return next((str(run.info.run_id) for run in found if run.info.status == "FINISHED"), None)


def fetch_files(made: MlflowClient, run_id: str, names: Sequence[str], target: Path, folder: str = "") -> None:
    """Download those of the named files that a folder of a run's artifacts has, replacing local ones of these names.

    UnavailableError if one cannot be read, MlflowException if there is no such run.
    """
    # By the artifacts' address: asked for them by the run's id, MLflow calls a file missing whatever the error was.
    home = str(retrying("Reading the run", lambda: made.get_run(run_id)).info.artifact_uri)
    listed = retrying("Listing files", lambda: made.list_artifacts(run_id, folder or None))
    there = {str(artifact.path).rpartition("/")[2] for artifact in listed}
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        (target / name).unlink(missing_ok=True)
        if name not in there:
            continue
        address = "/".join(filter(None, (home, folder, name)))
        where = {"artifact_uri": address, "dst_path": str(target), "tracking_uri": made.tracking_uri}
        remedy = "see that the run's files can be read from here, and what the tracking store's log says"
        with readable("MLflow", address, remedy):
            retrying(f"Fetching {name}", functools.partial(download_artifacts, **where))


def check_run(uri: str, run_id: str, address: str) -> None:
    """Raise `UnavailableError`, about the model at `address`, if the run that trained it takes no more results."""
    remedy = f"restore it (mlflow runs restore --run-id {run_id}), or give --no-log"
    with readable("model", address, remedy):
        run = retrying("Reading the run", lambda: client(uri).get_run(run_id))
    if run.info.lifecycle_stage == "deleted":
        raise UnavailableError("model", address, f"the run that trained it, {run_id}, is deleted", remedy)


def finish_run(uri: str, run_id: str, status: Literal["FINISHED", "FAILED", "KILLED"] = "FINISHED") -> None:
    """Close a run. A process that ends without this leaves it RUNNING until its key is opened again."""
    made = client(uri)
    close = storing if status == "FINISHED" else retrying  # after a failure, the server may be down as well
    close("Closing the run", lambda: made.set_terminated(run_id, status))


def tag_run(uri: str, run_id: str, tags: Mapping[str, str]) -> None:
    """Set tags of a run; empty values are left out."""
    made, given = client(uri), {name: value[:_TAG_LENGTH] for name, value in tags.items() if value}
    storing("Tagging the run", lambda: _set_tags(made, run_id, given))


def start_system_metrics(uri: str, run_id: str) -> Callable[[], None]:
    """Log the utilization of CPU, memory, disk, network and GPU; returns what stops it. Failures are only logged."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    logger = logging.getLogger("mlflow.system_metrics.system_metrics_monitor")
    logger.setLevel(logging.WARNING)  # it logs each start and stop, and missing GPUs
    try:
        options = {"sampling_interval": _SYSTEM_METRICS_SECONDS, "resume_logging": True, "tracking_uri": uri}
        monitor = SystemMetricsMonitor(run_id, **options)  # type: ignore[no-untyped-call]
        monitor.start()  # type: ignore[no-untyped-call]
    except Exception as error:  # noqa: BLE001 - psutil is missing, the server is down
        _log.warning("System metrics are not logged: %s", one_line(error))
        return lambda: None
    return monitor.finish


def _find(made: MlflowClient, experiment: str, key: str, value: str) -> list[Run]:
    """Runs whose tag `key` has this value, the earliest first."""
    # MLflow's filters have two kinds of quotes and no escape; a folder's name may contain both.
    quote = next((sign for sign in "'\"" if sign not in value), None)
    wanted = f"tags.`{key}` = {quote}{value}{quote}" if quote else f"tags.`{key}` LIKE '%'"
    order = ["attributes.start_time ASC", "attributes.run_id ASC"]
    found = search_all(made.search_runs, experiment_ids=[experiment], filter_string=wanted, order_by=order)
    return [run for run in found if run.data.tags.get(key) == value]


def _set_tags(made: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    made.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])


def _describe(
    made: MlflowClient, run_id: str, config: RunConfig, on_workers: RunConfig, facts: Mapping[str, str], resumed: int
) -> None:
    """Add the parameters and files that are missing; idempotent."""
    run = made.get_run(run_id)
    fields = {name: without_credentials(value) for name, value in flatten(on_workers.model_dump(mode="json"))}
    params = [Param(name, value[:_PARAM_LENGTH]) for name, value in fields.items() if name not in run.data.params]
    made.log_batch(run_id, params=params)
    digest, source = facts.get(FINGERPRINT, "unknown")[:_DIGEST_LENGTH], {"uri": config.data.root or config.data.name}
    dataset = Dataset(config.data.name, digest, "local", json.dumps(source), profile=json.dumps(dict(facts)))
    if not (run.inputs and run.inputs.dataset_inputs):
        made.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
    files = {artifact.path for artifact in made.list_artifacts(run_id)}
    text = to_yaml(config)
    if "config.yaml" not in files:
        made.log_text(run_id, text, "config.yaml")
    elif fields != {**fields, **run.data.params}:
        made.log_text(run_id, text, f"config-resumed-{resumed}.yaml")
    if resumed or "environment.json" not in files:
        name = f"environment-resumed-{resumed}.json" if resumed else "environment.json"
        made.log_text(run_id, json.dumps(environment(), indent=1), name)
