"""The steps of a training job: check, train on Ray, track, package, register."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from tla_service.attacks import craft
from tla_service.cluster.lease import Lease, held
from tla_service.cluster.metrics import Outcome, RunMetrics
from tla_service.cluster.placement import place
from tla_service.cluster.storage import RunFolder, check_storage, earlier_name
from tla_service.cluster.train import Record, fetch_checkpoint, fit_on_ray
from tla_service.config import RunConfig, TrackingConfig
from tla_service.data import Dataset, load_dataset
from tla_service.errors import UnavailableError, without_credentials
from tla_service.evaluation.figures import attack_panel, training_curves
from tla_service.files import expanded
from tla_service.inference.detector import Rejector
from tla_service.job import INTERRUPTED, log_as_json, next_command
from tla_service.models import Architecture
from tla_service.models.classifier import seen_by_triplets
from tla_service.registry.loading import load_model
from tla_service.registry.packaging import check_packaging, log_model
from tla_service.runtime import WorkerContext, generator
from tla_service.tracking.connection import check_tracking, sqlite_path, tracking_uri
from tla_service.tracking.run_log import RunLog
from tla_service.tracking.runs import finish_run, log_files, open_run, run_page, start_system_metrics
from tla_service.training.adversary import training_attack
from tla_service.training.checkpoint import data_facts
from tla_service.training.meter import NonFiniteLossError
from tla_service.training.network import check_network
from tla_service.training.output import CHECKPOINT, FitResult, show_summary, summarize, write_config, write_summary
from tla_service.training.precheck import check_room, checkpoint_bytes, kept_need, split_and_check
from tla_service.training.pretrained import check_source, find_pretrained
from tla_service.training.reporting import KEPT, LOG, JsonLines, JsonTerminal, Terminal

PANEL_IMAGES = 4
STATUSES: dict[Outcome, Literal["FINISHED", "FAILED", "KILLED"]] = {
    "finished": "FINISHED", "interrupted": "KILLED", "loss_not_finite": "FAILED", "failed": "FAILED",
}  # fmt: skip


@dataclass(frozen=True)
class Facts:
    """What the checks before a run found out."""

    dataset: Dataset
    architecture: Architecture
    weights: Mapping[str, Tensor]  # to start from, without a head that is to be drawn; empty if there are none
    notes: tuple[str, ...]  # on what is used of them
    checkpoint_bytes: int  # estimated
    described: dict[str, str]  # the data set, for MLflow
    began_with: dict[str, Any]  # what must be the same when a sweep goes on
    steps_per_epoch: int


def check_before_start(config: RunConfig) -> Facts:
    """Load what the run starts from; raise UserError if its parts are missing, or do not fit together."""
    architecture = Architecture.of(config.model)
    check_source(config)
    dataset = load_dataset(config.data)
    # What one worker cannot have, more of them cannot have either.
    most = WorkerContext(world_size=config.scaling.bounds(auto=1)[1])
    rows, (_, held_out), batches, extra = split_and_check(config, dataset, most, architecture)
    network = architecture.build(len(dataset.class_names), dataset.image_shape)
    check_network(config, architecture, network, dataset)
    seen_by_triplets(network, config.loss.triplet_layer)
    check_packaging(config, dataset.class_names, len(dataset.test), network.embedding_size)
    uri = tracking_uri(config.tracking)
    found = find_pretrained(config, network, lambda address: load_model(address, tracking=uri))
    described = {
        "data_fingerprint": dataset.fingerprint,
        "classes": str(len(dataset.class_names)),
        "training_images": str(len(rows)),
        "validation_images": str(len(held_out)),
        "test_images": str(len(dataset.test)),
        **extra,
    }
    if architecture.code_sha256 is not None:
        described["code_sha256"] = architecture.code_sha256
    began_with = data_facts(dataset, extra, architecture)
    if found.state_dict:
        described["pretrained_sha256"] = sha256(save(dict(found.state_dict))).hexdigest()
        began_with["pretrained_sha256"] = described["pretrained_sha256"]
    size = checkpoint_bytes(config, network)
    steps = batches.steps_per_epoch
    return Facts(dataset, architecture, found.state_dict, found.notes, size, described, began_with, steps)


def check_disks(config: RunConfig, output: Path, folder: str, checkpoint: int, runs: int = 1) -> None:
    """Check that local disks have room for checkpoints of so many bytes: those of the storage, and copies of one."""
    needs = {"output": (output, checkpoint), "TMPDIR": (Path(tempfile.gettempdir()), checkpoint)}
    if "://" not in folder:
        needs["scaling.storage"] = kept_need(expanded("scaling.storage", folder), checkpoint, runs * KEPT)
    database = sqlite_path(tracking_uri(config.tracking))
    if database is not None:
        needs["tracking.uri"] = (database.parent, checkpoint)
    check_room(needs)


class TrackedRun:
    """Sends a run's records to the terminal, `log.jsonl`, its MLflow run and Prometheus."""

    def __init__(self, config: RunConfig, output: Path, run_id: str, terminal: Terminal) -> None:
        self.uri, self.run_id = tracking_uri(config.tracking), run_id
        self.outcome: Outcome = "finished"
        self._sizes: list[tuple[int, int]] = []  # steps and the number of workers from each on
        self._terminal = terminal
        self._stop_system_metrics = start_system_metrics(self.uri, run_id)
        self.metrics = RunLog(self.uri, run_id, output / "unsent")
        self._lines = JsonLines(output / LOG)
        self.gauges = RunMetrics(config)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.outcome = "interrupted"
        elif error is not None:
            self.outcome = "loss_not_finite" if isinstance(error, NonFiniteLossError) else "failed"
        self.gauges.ended(self.outcome)
        self._stop_system_metrics()
        self._terminal.close()
        self.metrics.close()
        self._lines.close()
        try:
            finish_run(self.uri, self.run_id, STATUSES[self.outcome])
        except UnavailableError as unavailable:  # must not hide how the run ended
            self._terminal.say(f"warning: {unavailable}")

    def __call__(self, record: Record) -> None:
        """Take one record from the workers."""
        self.gauges.take(record)
        if record["event"] == "placed":
            return
        self._lines.write({name: value for name, value in record.items() if name != "history"})
        self.gauges.unsent(self.metrics.unsent_bytes())
        self._terminal.show(record)
        for metrics in record.get("history", ()):
            self.metrics.log_epoch(metrics)
        if record["event"] == "start":
            self._sizes = record["sizes"]
            self.log_workers(current=False)
        elif record["event"] == "epoch":
            self.metrics.log_epoch(record["metrics"])
            self.log_workers(current=record["checkpoint"])
        elif record["event"] == "validation":
            self.metrics.log_epoch(record["metrics"])

    def log_workers(self, *, current: bool = True) -> None:
        """Log from which step on how many workers trained; the `current` ones once a checkpoint has made it final."""
        for step, workers in self._sizes if current else self._sizes[:-1]:
            self.metrics.log({"workers": workers}, step)


def run_training(config: RunConfig, output: Path, join: Callable[[], None], *, json_logs: bool) -> int:
    """As `tla_service.workflows.train.train_and_register`, in a locked folder; `join` waits for the Ray cluster."""
    began = time.monotonic()
    terminal, labels = open_terminal(config, json_logs=json_logs)
    with contextlib.ExitStack() as stack:
        check_tracking(config.tracking)
        if config.scaling.storage is not None:
            check_storage(config.scaling.storage)
        facts = check_before_start(config)
        storage = config.scaling.storage or str(output / "ray")
        config = earlier_name(config, storage)
        run_key = f"{storage}/{config.run_name}"
        lease = Lease()
        if config.scaling.storage is not None:  # else the checkpoints are in the output folder, which is locked
            lease = stack.enter_context(held(RunFolder(storage, config.run_name), terminal.say))
        check_disks(config, output, run_key, facts.checkpoint_bytes)
        terminal.say(f"run {config.run_name}: {config.method} on {config.data.name}, output in {output}")
        for note in facts.notes:
            terminal.say(note)
        join()
        placement = place(config)
        split_and_check(config, facts.dataset, WorkerContext(world_size=placement.num_workers), facts.architecture)
        start_seconds = 0.0
        run_id = labels["run_id"] = open_run(config, run_key, facts=facts.described, use_gpu=placement.use_gpu)
        with TrackedRun(config, output, run_id, terminal) as tracked:
            terminal.say(f"MLflow: {run_page(tracked.uri, run_id)}")

            def follow(record: Record) -> None:
                nonlocal start_seconds
                lease.check()
                if record["event"] == "placed":
                    start_seconds = start_seconds or time.monotonic() - began
                elif record["event"] == "start":
                    write_config(config, output)
                tracked(record)

            log_labels, copy = labels if json_logs else None, output / CHECKPOINT
            result, stored = fit_on_ray(
                config,
                placement,
                storage,
                follow,
                facts.weights,
                log_labels,
                with_rejector=True,
                code=facts.architecture.code,
            )
            fetch_checkpoint(stored, copy)
            if result.interrupted:
                tracked.outcome = "interrupted"
                tracked.log_workers()
                write_summary(output, {"status": "interrupted", "run_id": run_id, "checkpoint": str(copy)})
                terminal.say("stopped after a checkpoint; the same command resumes from it")
                return INTERRUPTED
            summary = _conclude(config, output, facts, result, tracked, start_seconds)
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
    config: RunConfig, output: Path, facts: Facts, result: FitResult, tracked: TrackedRun, start_seconds: float
) -> dict[str, Any]:
    """Log what is left, draw, package and register; returns the summary."""
    begin = time.monotonic()
    dataset, checkpoint = facts.dataset, output / CHECKPOINT
    weights = load_file(checkpoint / "best.safetensors")
    for metrics in result.history:
        tracked.metrics.log_epoch(metrics)
    tracked.metrics.log(
        {f"test/{name}": value for name, value in result.test.items()}, int(result.history[-1]["epoch"])
    )
    figures = _draw(config, output / "figures", facts, result, weights)
    files = {f"figures/{path.name}": path for path in figures} | {LOG: output / LOG}
    # What resuming takes. The best weights, in it too, are packaged below.
    files |= {f"checkpoint/{path.name}": path for path in checkpoint.iterdir()}
    log_files(tracked.uri, tracked.run_id, files)
    model_uri = log_model(
        tracked.uri,
        tracked.run_id,
        state_dict=weights,
        config=config,
        class_names=dataset.class_names,
        image_shape=dataset.image_shape,
        example=dataset.test.fetch(torch.arange(min(4, len(dataset.test)))).float().div(255).numpy(),
        metrics=result.test,
        registered_model=config.registered_model,
        facts=facts.described,
        rejector=Rejector.from_arrays(result.rejector) if result.rejector else None,
        code=facts.architecture.code,
    )
    summary = summarize(config, result, checkpoint)
    seconds = {"start": start_seconds, **summary["wall_seconds"], "register": time.monotonic() - begin}
    return summary | {
        "run_id": tracked.run_id,
        "tracking_uri": without_credentials(tracked.uri),
        "model_uri": model_uri,
        "wall_seconds": {name: round(value, 2) for name, value in seconds.items()},
        "restarts": tracked.gauges.restarts,
        "figures": [str(path) for path in figures],
    }


def _draw(
    config: RunConfig, folder: Path, facts: Facts, result: FitResult, weights: Mapping[str, Tensor]
) -> list[Path]:
    """Draw the training curves, and a few test images before and after the training attack."""
    folder.mkdir(parents=True, exist_ok=True)
    curves, panel = folder / "training_curves.png", folder / "attack.png"
    training_curves(result.history, result.best, curves)
    dataset = facts.dataset
    network = facts.architecture.build(len(dataset.class_names), dataset.image_shape)
    network.load_state_dict(weights)
    network.eval()
    rows = torch.arange(min(PANEL_IMAGES, len(dataset.test)))
    clean, labels = dataset.test.fetch(rows).float() / 255, dataset.test.labels[rows]
    random, attack = generator(clean.device, config.seed), training_attack(config, facts.architecture.code)
    adversarial = craft(lambda images: network(images).logits, clean, labels, attack, random)
    with torch.no_grad():
        before, after = (network(images).logits.argmax(1).tolist() for images in (clean, adversarial))
    attack_panel(clean.numpy(), adversarial.numpy(), labels.tolist(), before, after, dataset.class_names, panel)
    return [curves, panel]
