"""The result of a run, and its output folder, which no other run overwrites."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from tla_service.config import RunConfig
from tla_service.config.loading import CONFIG, load_config_file, same_run, to_yaml
from tla_service.errors import ConfigError, UnavailableError, without_credentials
from tla_service.files import expanded, write_whole

if TYPE_CHECKING:  # without torch, a job can look whether its run has finished before
    from tla_service.training.reporting import Terminal

SUMMARY = "summary.json"
CHECKPOINT = "checkpoint"  # folder of the newest one
FINISHED = "this run has finished before; to train again choose another --name, --seed or --output"


@dataclass
class FitResult:
    """The result of a run, in plain values: it crosses process boundaries."""

    interrupted: bool  # a stop was requested; the run can resume from its last checkpoint
    test: dict[str, float]  # accuracies of the best weights; empty if interrupted or not requested
    best: dict[str, float]  # metrics of the epoch of the best weights
    history: list[dict[str, float]]  # metrics of every epoch
    wall_seconds: dict[str, float]  # by phase, on rank 0
    facts: dict[str, str] = field(default_factory=dict)  # data set, workers, device
    rejector: dict[str, npt.NDArray[Any]] = field(default_factory=dict)  # see `inference.detector.Rejector`; or empty


def open_output(config: RunConfig, output: Path) -> dict[str, Any] | None:
    """Check that a locked folder is this run's, or new; its summary, if the run has finished there before.

    Raises:
        ConfigError: The folder holds another run, what is no run's, or a run that has finished on other data, with
            other code, or has measured other things on the test set.
        UnavailableError: It cannot be read.
    """
    try:
        if (output / CONFIG).exists() and not same_run((output / CONFIG).read_text(errors="replace"), config):
            remedy = "choose another --output or --name"
            raise ConfigError("output", output, "holds a run with another configuration", remedy)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UnavailableError("output", output, f"cannot be read ({reason})", "choose another --output") from error
    found = [name for name in (CHECKPOINT, SUMMARY) if (output / name).exists()]
    if found and not (output / CONFIG).exists():
        reason = f"holds a {found[0]} that is not a run's, which would be replaced"
        raise ConfigError("output", output, reason, "choose another --output, or move it")
    if SUMMARY not in found:
        return None
    try:
        summary: dict[str, Any] = json.loads((output / SUMMARY).read_text(errors="replace"))
        has_finished = summary["status"] == "finished"
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError("output", output, f"its {SUMMARY} is damaged", "delete that file") from error
    if not has_finished:
        return None
    _check_finished(config, output, Path(summary.get("checkpoint", output)))
    return summary


def _check_finished(config: RunConfig, output: Path, checkpoint: Path) -> None:
    """Refuse what is no part of a run's identity, but of its results."""
    before = load_config_file(output / CONFIG)
    for name in ("evaluation.test", "data.test_limit", "data.validation", "data.root", "data.extra.path"):
        was, now = (_located(name, attrgetter(name)(each)) for each in (before, config))
        if was != now:
            reason = f"a run that has finished in {output} had another {name}"
            remedy = "choose another --output, or evaluate its model with jobs/evaluate_tla.py"
            raise ConfigError(name, None, reason, remedy)
    if config.model.code is not None:
        from tla_service.models.own_code import pack  # late, since both import torch
        from tla_service.training.checkpoint import CODE

        code = checkpoint / CODE
        if code.is_file() and code.read_bytes() != pack(config.model.code):
            reason = f"its files are not those of the run that has finished in {output}"
            raise ConfigError("model.code", config.model.code, reason, "bring them back, or choose another --output")


def _located(name: str, value: Any) -> Any:
    """A setting; a path however it is given, without the credentials that the file lacks."""
    return expanded(name, without_credentials(value)).resolve() if isinstance(value, str) and value else value


def write_config(config: RunConfig, output: Path) -> None:
    """Write `config.yaml`, which makes the folder this run's: once training begins, so a refused run keeps none."""
    write_whole(output / CONFIG, to_yaml(config))


def summarize(config: RunConfig, result: FitResult, checkpoint: Path | None) -> dict[str, Any]:
    """The summary of a finished run; `checkpoint` is its newest one."""
    rates = [epoch["images_per_second"] for epoch in result.history]
    return {
        "status": "finished",
        "run_name": config.run_name,
        "method": config.method,
        "seed": config.seed,
        **by_attack(result.test),
        "best_epoch": int(result.best["epoch"]),
        "validation": {key: value for key, value in result.best.items() if key.startswith("validation/")},
        "images_per_second": sum(rates) / len(rates),
        "wall_seconds": {name: round(value, 2) for name, value in result.wall_seconds.items()},
        "facts": result.facts,
        "checkpoint": str(checkpoint),
    }


def by_attack(measured: Mapping[str, float]) -> dict[str, Any]:
    """Measured accuracies as `clean_accuracy` and `robust_accuracy` by attack, with `worst` over all attacks."""
    prefix = "robust_accuracy/"
    robust = {name.removeprefix(prefix): value for name, value in measured.items() if name.startswith(prefix)}
    robust["worst"] = measured["robust_accuracy"]
    return {"clean_accuracy": measured["clean_accuracy"], "robust_accuracy": robust}


def write_summary(output: Path, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`."""
    write_whole(output / SUMMARY, json.dumps(summary, indent=2))


def show_summary(summary: Mapping[str, Any], terminal: "Terminal") -> None:
    """Show the accuracies, and where everything is."""
    terminal.say("")
    terminal.say(f"clean accuracy            {summary['clean_accuracy']:7.2%}   (test set, best-on-validation weights)")
    for name, value in summary["robust_accuracy"].items():
        terminal.say(f"robust accuracy {name:<9} {value:7.2%}")
    if "model_uri" in summary:
        terminal.say(f"model      {summary['model_uri']}")
        terminal.say(f"tracking   {summary['tracking_uri']}  run {summary['run_id']}")
    terminal.say(f"checkpoint {summary['checkpoint']}")
    for path in summary.get("figures", ()):
        terminal.say(f"picture    {path}")
    terminal.say(f"wall time  {sum(summary['wall_seconds'].values()):.0f} s")
