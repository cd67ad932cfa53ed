"""The steps of a training job: check, train on Ray, track, package, register."""

import contextlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch

from tla_service.attacks import craft
from tla_service.cluster.lease import held
from tla_service.cluster.metrics import Outcome, RunMetrics
from tla_service.cluster.session import place
from tla_service.cluster.storage import RunFolder, check_storage, earlier_name
from tla_service.cluster.train import Record, TrainedRun, train_on_ray
from tla_service.config import RunConfig, TrackingConfig
from tla_service.data import Dataset
from tla_service.errors import UnavailableError, without_credentials
from tla_service.evaluation.figures import attack_panel, training_curves
from tla_service.inference.detector import Rejector
from tla_service.job import INTERRUPTED, log_as_json, next_command
from tla_service.models import build_model
from tla_service.registry.packaging import log_model
from tla_service.runtime import generator
from tla_service.tracking.connection import check_tracking, tracking_uri
from tla_service.tracking.run_log import RunLog
from tla_service.tracking.runs import finish_run, log_files, open_run, run_page, start_system_metrics
from tla_service.training.adversary import training_attack
from tla_service.training.meter import NonFiniteLossError
from tla_service.training.output import show_summary, summarize, write_config, write_summary
from tla_service.training.reporting import LOG, JsonLines, JsonTerminal, Terminal
from tla_service.workflows.checks import Facts, check_before_start, check_disks, check_split

PANEL_IMAGES = 4
STATUSES: dict[Outcome, Literal["FINISHED", "FAILED", "KILLED"]] = {
    "finished": "FINISHED", "interrupted": "KILLED", "loss_not_finite": "FAILED", "failed": "FAILED",
}  # fmt: skip


class TrackedRun:
    """Sends a run's records to the terminal, `log.jsonl`, MLflow and Prometheus, from its start to its outcome.

    Args:
        config: The run.
        output: Its output folder.
        run_key: Identifies the run in MLflow when it resumes.
        facts: Data set facts for MLflow.
        terminal: Where progress is shown.

    Attributes:
        run_id: The run in MLflow.
        interrupted: Set when training stopped early on request.
        restarts: How often workers failed and were restarted.
    """

    def __init__(
        self, config: RunConfig, output: Path, run_key: str, facts: Mapping[str, str], terminal: Terminal
    ) -> None:
        self.uri = tracking_uri(config.tracking)
        self.run_id = open_run(config, run_key, facts=facts)
        self.interrupted, self.restarts = False, 0
        self._terminal = terminal
        self._stop_system_metrics = start_system_metrics(self.uri, self.run_id)
        self._metrics = RunLog(self.uri, self.run_id, str(output / "unsent"))
        self._lines = JsonLines(output / LOG)
        self._gauges = RunMetrics(config)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        outcome: Outcome = "failed"
        if self.interrupted or isinstance(error, KeyboardInterrupt):
            outcome = "interrupted"
        elif isinstance(error, NonFiniteLossError):
            outcome = "loss_not_finite"
        elif error is None:
            outcome = "finished"
        self._gauges.ended(outcome)
        self._stop_system_metrics()
        self._terminal.close()
        self._metrics.close()
        self._lines.close()
        try:
            finish_run(self.uri, self.run_id, STATUSES[outcome])
        except UnavailableError as unavailable:  # must not hide how the run ended
            self._terminal.say(f"warning: {unavailable}")

    def __call__(self, record: Record) -> None:
        """Take one record from the workers."""
        self._lines.write({name: value for name, value in record.items() if name != "history"})
        self._gauges.take(record)
        self._gauges.unsent(self._metrics.unsent_bytes())
        self._terminal.show(record)
        for metrics in record.get("history", ()):
            self.log_epoch(metrics)
        if record["event"] == "epoch":
            self.log_epoch(record["metrics"])
        elif record["event"] == "failure":
            self.restarts += 1

    def log_epoch(self, metrics: Mapping[str, float]) -> None:
        """Send an epoch's metrics; MLflow keeps the first value of each."""
        self.log({name: value for name, value in metrics.items() if name != "epoch"}, int(metrics["epoch"]))

    def log(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Send metrics of an epoch."""
        self._metrics.log(metrics, epoch)


def run_training(config: RunConfig, output: Path, join: Callable[[], None], *, json_logs: bool) -> int:
    """Train and register; see `tla_service.workflows.train.train_and_register`.

    Args:
        config: The run.
        output: Its output folder, locked.
        join: Waits until the Ray cluster is joined.
        json_logs: Write progress and log as JSON lines.
    """
    began = time.monotonic()
    terminal, labels = open_terminal(config, json_logs=json_logs)
    with contextlib.ExitStack() as stack:
        check_tracking(config.tracking)
        facts = check_before_start(config)
        storage = config.scaling.storage or str(output / "ray")
        check_storage(storage)
        config = earlier_name(config, storage)
        run_key = f"{storage}/{config.run_name}"
        lease = None
        if config.scaling.storage is not None:  # else the checkpoints are in the output folder, which is locked
            lease = stack.enter_context(held(RunFolder(storage, config.run_name), terminal.say))
        check_disks(config, output, run_key, facts.checkpoint_bytes)
        terminal.say(f"run {config.run_name}: {config.method} on {config.data.name}, output in {output}")
        join()
        placement = place(config)
        check_split(config, facts.dataset, placement.num_workers)
        start_seconds = 0.0
        with TrackedRun(config, output, run_key, facts.described, terminal) as tracked:
            labels["run_id"] = tracked.run_id
            terminal.say(f"MLflow: {run_page(tracked.uri, tracked.run_id)}")

            def follow(record: Record) -> None:
                nonlocal start_seconds
                if lease is not None:
                    lease.check()
                if record["event"] == "placed":
                    start_seconds = start_seconds or time.monotonic() - began
                    return
                if record["event"] == "start":
                    write_config(config, output)
                tracked(record)

            log_labels = labels if json_logs else None
            copy = output / "checkpoint"
            trained = train_on_ray(config, placement, storage, copy, follow, facts.weights, log_labels)
            if trained.result.interrupted:
                tracked.interrupted = True
                summary = {"status": "interrupted", "run_id": tracked.run_id, "checkpoint": str(trained.checkpoint)}
                write_summary(output, summary)
                terminal.say("stopped after a checkpoint; the same command resumes from it")
                return INTERRUPTED
            summary = _conclude(config, output, facts, trained, tracked, start_seconds)
    write_summary(output, summary)
    show_end(summary, terminal)
    return 0


def open_terminal(config: RunConfig, *, json_logs: bool) -> tuple[Terminal, dict[str, Any]]:
    """Where progress is shown, and the labels of JSON lines; the run's id is added once it is known."""
    labels = {"run": config.run_name, "run_id": "", "rank": "driver"}
    if not json_logs:
        return Terminal(), labels
    log_as_json(labels)
    return JsonTerminal(labels), labels


def show_end(summary: Mapping[str, Any], terminal: Terminal) -> None:
    """Show the summary and, on the last line, how to evaluate the model, registered or not."""
    show_summary(summary, terminal)
    uri = without_credentials(summary["tracking_uri"])
    # The flag is needed unless the environment names the same store.
    where = [] if without_credentials(tracking_uri(TrackingConfig())) == uri else ["--tracking.uri", uri]
    terminal.say(next_command("evaluate_tla.py", "--model", summary["model_uri"], *where))


def _conclude(
    config: RunConfig, output: Path, facts: Facts, trained: TrainedRun, tracked: TrackedRun, start_seconds: float
) -> dict[str, Any]:
    """Log what is left, draw, package and register; returns the summary."""
    begin = time.monotonic()
    result, dataset = trained.result, facts.dataset
    for metrics in result.history:
        tracked.log_epoch(metrics)
    tracked.log({f"test/{name}": value for name, value in result.test.items()}, int(result.history[-1]["epoch"]))
    figures = draw_figures(config, output / "figures", dataset, trained)
    files = {f"figures/{path.name}": path for path in figures} | {LOG: output / LOG}
    # What resuming takes. The best weights, in it too, are packaged below.
    files |= {f"checkpoint/{path.name}": path for path in trained.checkpoint.iterdir()}
    log_files(tracked.uri, tracked.run_id, files)
    model_uri = log_model(
        tracked.uri,
        tracked.run_id,
        state_dict=trained.best_weights,
        config=config,
        class_names=dataset.class_names,
        image_shape=dataset.image_shape,
        example=dataset.test.fetch(torch.arange(min(4, len(dataset.test)))).float().div(255).numpy(),
        metrics=result.test,
        registered_model=config.registered_model,
        facts=facts.described,
        rejector=Rejector.from_arrays(result.rejector) if result.rejector else None,
    )
    summary = summarize(config, result, trained.checkpoint)
    seconds = {"start": start_seconds, **summary["wall_seconds"], "register": time.monotonic() - begin}
    return summary | {
        "run_id": tracked.run_id,
        "tracking_uri": without_credentials(tracked.uri),
        "model_uri": model_uri,
        "wall_seconds": {name: round(value, 2) for name, value in seconds.items()},
        "restarts": tracked.restarts,
        "figures": [str(path) for path in figures],
    }


def draw_figures(config: RunConfig, folder: Path, dataset: Dataset, trained: TrainedRun) -> list[Path]:
    """Draw the training curves, and a few test images before and after the training attack."""
    folder.mkdir(parents=True, exist_ok=True)
    curves, panel = folder / "training_curves.png", folder / "attack.png"
    training_curves(trained.result.history, curves)
    network = build_model(config.model.name, len(dataset.class_names), dataset.image_shape, config.model.normalization)
    network.load_state_dict(trained.best_weights)
    network.eval()
    rows = torch.arange(min(PANEL_IMAGES, len(dataset.test)))
    clean, labels = dataset.test.fetch(rows).float() / 255, dataset.test.labels[rows]
    random = generator(clean.device, config.seed)
    adversarial = craft(lambda images: network(images).logits, clean, labels, training_attack(config), random)
    with torch.no_grad():
        before, after = (network(images).logits.argmax(1).tolist() for images in (clean, adversarial))
    attack_panel(clean.numpy(), adversarial.numpy(), labels.tolist(), before, after, dataset.class_names, panel)
    return [curves, panel]
