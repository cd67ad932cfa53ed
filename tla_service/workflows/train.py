"""From a configuration to a registered model: check, train on Ray, package, register, sum up."""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from tla_service.attacks import craft
from tla_service.cluster.lease import held
from tla_service.cluster.metrics import Outcome, RunMetrics
from tla_service.cluster.session import check_storage, place, ray_session
from tla_service.cluster.storage import RunFolder, earlier_name
from tla_service.cluster.train import Record, TrainedRun, train_on_ray
from tla_service.config import RunConfig, TrackingConfig
from tla_service.config.names import attack_trouble
from tla_service.data import Dataset, load_dataset, split_validation
from tla_service.errors import ConfigError, UnavailableError, without_credentials
from tla_service.evaluation.figures import attack_panel, training_curves
from tla_service.inference.detector import Rejector
from tla_service.job import INTERRUPTED, next_command
from tla_service.lock import locked_folder
from tla_service.logs import log_as_json
from tla_service.models import build_model
from tla_service.models.classifier import seen_by_triplets
from tla_service.registry.loading import load_model
from tla_service.registry.packaging import check_packaging, log_model
from tla_service.runtime import WorkerContext, generator
from tla_service.tracking.connection import check_tracking, sqlite_path, tracking_uri
from tla_service.tracking.run_log import RunLog
from tla_service.tracking.runs import finish_run, log_files, open_run, run_page, start_system_metrics
from tla_service.training.adversary import training_attack
from tla_service.training.fit import training_batches
from tla_service.training.meter import NonFiniteLossError
from tla_service.training.output import open_output, show_summary, summarize, write_config, write_summary
from tla_service.training.precheck import (
    check_room,
    check_start,
    check_weights,
    checkpoint_bytes,
    kept_need,
    scratch_need,
)
from tla_service.training.reporting import KEPT, LOG, JsonLines, JsonTerminal, Terminal

PANEL_IMAGES = 4
Status = Literal["FINISHED", "FAILED", "KILLED"]
OUTCOMES: dict[Status, Outcome] = {"FINISHED": "finished", "KILLED": "interrupted", "FAILED": "failed"}


@dataclass
class Follower:
    """Takes the records of a run: shows, logs and tracks them.

    Attributes:
        terminal: Shows them.
        lines: `log.jsonl`.
        metrics: Sends epochs to MLflow.
        gauges: Tells Prometheus.
        began: When the job began, on the monotonic clock.
        start_seconds: From there to the first worker's start.
        restarts: How often workers failed and were started again.
    """

    terminal: Terminal
    lines: JsonLines
    metrics: "RunLog"
    gauges: RunMetrics
    began: float
    start_seconds: float = 0.0
    restarts: int = 0

    def __call__(self, record: Record) -> None:
        """Take one record."""
        if record["event"] == "placed":
            self.start_seconds = self.start_seconds or time.monotonic() - self.began
            return
        self.lines.write({name: value for name, value in record.items() if name != "history"})
        self.gauges.take(record)
        self.gauges.unsent(self.metrics.unsent_bytes())
        self.terminal.show(record)
        for metrics in record.get("history", ()):
            self.log_epoch(metrics)
        if record["event"] == "epoch":
            self.log_epoch(record["metrics"])
        elif record["event"] == "failure":
            self.restarts += 1

    def close(self) -> None:
        """Take progress down; send what waits for MLflow, as long as that takes no longer than half a minute."""
        self.terminal.close()
        self.metrics.close()
        self.lines.close()

    def log_epoch(self, metrics: Mapping[str, float]) -> None:
        """Send an epoch's metrics; what MLflow has of it already is left out."""
        self.metrics.log({name: value for name, value in metrics.items() if name != "epoch"}, int(metrics["epoch"]))


@dataclass(frozen=True)
class Facts:
    """What the checks before a run found out.

    Attributes:
        dataset: The data.
        weights: State dict to start from, or None.
        checkpoint_bytes: Size of a checkpoint, estimated.
        described: Data set facts for the tracking server.
    """

    dataset: Dataset
    weights: Mapping[str, torch.Tensor] | None
    checkpoint_bytes: int
    described: dict[str, str] = field(default_factory=dict)


def train_and_register(config: RunConfig, output: Path, *, debug: bool = False, json_logs: bool = False) -> int:
    """Run a training job to its end.

    Args:
        config: The run.
        output: Folder for `summary.json`, `config.yaml`, `log.jsonl`, figures, the newest checkpoint and, unless
            `scaling.storage` says otherwise, what Ray keeps.
        debug: Show what Ray and its workers log.
        json_logs: Write progress and log as JSON lines, with run, run id and rank.

    Returns:
        The job's exit code: 0, or 130 after an interrupt.

    Raises:
        UserError: Something is wrong or missing, or another process is at this run; found before workers start, as far
            as it can be.
    """
    terminal, labels = _open_terminal(config, json_logs=json_logs)
    with contextlib.ExitStack() as locks:
        locks.enter_context(locked_folder(output, "output"))
        finished = open_output(config, output)
        if finished is None:
            return _train(config, output, locks, terminal, labels, debug=debug, json_logs=json_logs)
    terminal.say("this run has finished before; to train again choose another --name, --seed or --output")
    _show_end(finished, terminal)
    return 0


def _train(
    config: RunConfig,
    output: Path,
    locks: contextlib.ExitStack,
    terminal: Terminal,
    labels: dict[str, Any],
    *,
    debug: bool,
    json_logs: bool,
) -> int:
    """Train in an output folder that is locked; returns as `train_and_register`."""
    began = time.monotonic()
    check_tracking(config.tracking)
    facts = check_before_start(config)
    storage = config.scaling.storage or str(output / "ray")
    check_storage(storage)
    config, check = _claim_storage(config, storage, locks, terminal)
    check_disks(config, output, f"{storage}/{config.run_name}", facts.checkpoint_bytes)
    terminal.say(f"run {config.run_name}: {config.method} on {config.data.name}, output in {output}")
    with ray_session(config, debug=debug):
        placement = place(config)
        check_split(config, facts.dataset, placement.num_workers)
        uri = tracking_uri(config.tracking)
        run_id = open_run(config, f"{storage}/{config.run_name}", facts=facts.described)
        stop_system_metrics = start_system_metrics(uri, run_id)
        metrics = RunLog(uri, run_id, str(output / "unsent"))
        follower = Follower(terminal, JsonLines(output / LOG), metrics, RunMetrics(config), began)
        status: Status = "FAILED"
        outcome: Outcome | None = None

        def follow(record: Record) -> None:
            check()
            if record["event"] == "start":
                write_config(config, output)
            follower(record)

        labels["run_id"] = run_id
        try:
            terminal.say(f"MLflow: {run_page(uri, run_id)}")
            trained = train_on_ray(
                config,
                placement,
                storage,
                output / "checkpoint",
                follow,
                facts.weights,
                labels if json_logs else None,
            )
            if trained.result.interrupted:
                status = "KILLED"
                write_summary(
                    output, {"status": "interrupted", "run_id": run_id, "checkpoint": str(trained.checkpoint)}
                )
                terminal.say("stopped after a checkpoint; the same command goes on from it")
                return INTERRUPTED
            summary = _conclude(config, output, facts, trained, follower, uri, run_id)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except NonFiniteLossError:
            outcome = "loss_not_finite"
            raise
        finally:
            follower.gauges.ended(outcome or OUTCOMES[status])
            stop_system_metrics()
            follower.close()
            _close_run(uri, run_id, status, terminal)
    write_summary(output, summary)
    _show_end(summary, terminal)
    return 0


def _claim_storage(
    config: RunConfig, storage: str, locks: contextlib.ExitStack, terminal: Terminal
) -> tuple[RunConfig, Callable[[], None]]:
    """The run by the name it has in the storage, and what raises when another driver has taken it."""
    config = earlier_name(config, storage)
    if config.scaling.storage is None:  # it is in the output folder, which is locked
        return config, lambda: None
    return config, locks.enter_context(held(RunFolder(storage, config.run_name), terminal.say)).check


def _show_end(summary: Mapping[str, Any], terminal: Terminal) -> None:
    """Show the summary and, on the last line, how to evaluate the model: registered or not, its address serves."""
    show_summary(summary, terminal)
    uri = without_credentials(summary["tracking_uri"])
    # The flag is needed unless the environment names the same store.
    where = [] if without_credentials(tracking_uri(TrackingConfig())) == uri else ["--tracking.uri", uri]
    terminal.say(next_command("evaluate_tla.py", "--model", summary["model_uri"], *where))


def _open_terminal(config: RunConfig, *, json_logs: bool) -> tuple[Terminal, dict[str, Any]]:
    """Where progress is shown, and the labels of JSON lines; the run's id is put there once it is known."""
    labels = {"run": config.run_name, "run_id": "", "rank": "driver"}
    if not json_logs:
        return Terminal(), labels
    log_as_json(labels)
    return JsonTerminal(labels), labels


def _close_run(uri: str, run_id: str, status: Status, terminal: Terminal) -> None:
    """Close the run in MLflow; a server that is away must not hide how the run ended."""
    try:
        finish_run(uri, run_id, status)
    except UnavailableError as error:
        terminal.say(f"warning: {error}")


def check_before_start(config: RunConfig) -> Facts:
    """Load what the run starts from, and check that its parts fit, before any worker is claimed.

    Raises:
        UserError: Data, model or initial weights are missing, or do not fit together.
    """
    trouble = config.tracking.trouble() or attack_trouble("evaluation.test", config.evaluation.test)
    if trouble is not None:
        raise ConfigError(*trouble)
    dataset = load_dataset(config.data)
    check_split(config, dataset, config.scaling.num_workers if isinstance(config.scaling.num_workers, int) else 1)
    network = build_model(config.model.name, len(dataset.class_names), dataset.image_shape, config.model.normalization)
    seen_by_triplets(network, config.loss.triplet_layer)
    check_packaging(config, dataset.class_names, len(dataset.test), network.embedding_size)
    weights = None
    if config.model.weights is not None:
        uri = tracking_uri(config.tracking)
        weights = load_model(config.model.weights, tracking=uri).state_dict()
        check_weights(config, network, weights)
    described = {
        "data_fingerprint": dataset.fingerprint,
        "classes": str(len(dataset.class_names)),
        "training_images": str(len(dataset.train)),
        "test_images": str(len(dataset.test)),
    }
    return Facts(dataset, weights, checkpoint_bytes(config, network), described)


def check_disks(config: RunConfig, output: Path, folder: str, checkpoint: int, runs: int = 1) -> None:
    """Room for checkpoints, in the storage and where MLflow's artifacts go, as far as they are local.

    Args:
        config: The run.
        output: Its output folder.
        folder: Where its checkpoints are kept, in the storage.
        checkpoint: Size of one, in bytes.
        runs: How many runs keep theirs there.

    Raises:
        UnavailableError: A disk has not enough.
    """
    needs = {"output": (output, checkpoint), "TMPDIR": scratch_need(checkpoint)}
    if "://" not in folder:
        needs["scaling.storage"] = kept_need(Path(folder).expanduser(), checkpoint, runs * KEPT)
    database = sqlite_path(tracking_uri(config.tracking))
    if database is not None:
        needs["tracking.uri"] = (database.parent, checkpoint)
    check_room(needs)


def check_split(config: RunConfig, dataset: Dataset, num_workers: int) -> None:
    """Pool and batch against the training split: what one worker cannot have, more of them cannot have either."""
    labels, fraction = dataset.train.labels, config.data.validation_fraction
    rows, _ = split_validation(labels, fraction, config.seed, dataset.class_names)
    training_batches(config, dataset, rows, WorkerContext(world_size=num_workers))
    check_start(config, dataset, rows, num_workers)


def _conclude(
    config: RunConfig, output: Path, facts: Facts, trained: TrainedRun, follower: Follower, uri: str, run_id: str
) -> dict[str, Any]:
    """Track what is left, draw, package and register; returns the summary."""
    begin = time.monotonic()
    result = trained.result
    for metrics in result.history:
        follower.log_epoch(metrics)
    last = int(result.history[-1]["epoch"])
    follower.metrics.log({f"test/{name}": value for name, value in result.test.items()}, last)
    figures = draw_figures(config, output / "figures", facts.dataset, trained)
    files = {f"figures/{path.name}": path for path in figures} | {LOG: output / LOG}
    # The last weights and all it takes to go on; the best weights, in it too, are what gets packaged below.
    files |= {f"checkpoint/{path.name}": path for path in trained.checkpoint.iterdir()}
    log_files(uri, run_id, files)
    example = facts.dataset.test.fetch(torch.arange(min(4, len(facts.dataset.test)))).float().div(255).numpy()
    model_uri = log_model(
        uri,
        run_id,
        state_dict=trained.best_weights,
        config=config,
        class_names=facts.dataset.class_names,
        image_shape=facts.dataset.image_shape,
        example=example,
        metrics=result.test,
        registered_model=config.registered_model,
        facts=facts.described,
        rejector=Rejector.from_arrays(result.rejector) if result.rejector else None,
    )
    summary = summarize(config, result, trained.checkpoint)
    register_seconds = round(time.monotonic() - begin, 2)
    return summary | {
        "run_id": run_id,
        "tracking_uri": without_credentials(uri),
        "model_uri": model_uri,
        "wall_seconds": {
            "start": round(follower.start_seconds, 2),
            **summary["wall_seconds"],
            "register": register_seconds,
        },
        "restarts": follower.restarts,
        "figures": [str(path) for path in figures],
    }


def draw_figures(config: RunConfig, folder: Path, dataset: Dataset, trained: TrainedRun) -> list[Path]:
    """Draw the training curves, and a few test images with what the training attack makes of them."""
    folder.mkdir(parents=True, exist_ok=True)
    training_curves(trained.result.history, folder / "training_curves.png")
    network = build_model(
        config.model.name, len(dataset.class_names), dataset.image_shape, config.model.normalization
    ).eval()
    network.load_state_dict(trained.best_weights)
    rows = torch.arange(min(PANEL_IMAGES, len(dataset.test)))
    clean, labels = dataset.test.fetch(rows).float() / 255, dataset.test.labels[rows]
    attack = training_attack(config)
    adversarial = craft(
        lambda images: network(images).logits, clean, labels, attack, generator(clean.device, config.seed)
    )
    with torch.no_grad():
        before, after = (network(images).logits.argmax(1).tolist() for images in (clean, adversarial))
    attack_panel(
        clean.numpy(), adversarial.numpy(), labels.tolist(), before, after, dataset.class_names, folder / "attack.png"
    )
    return [folder / "training_curves.png", folder / "attack.png"]
