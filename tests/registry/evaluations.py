"""Evaluations of registered versions, with fates chosen by the test."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from mlflow import MlflowClient

from tests.registry.tracking_server import Packaged
from tla_service.evaluation.intervals import class_accuracy
from tla_service.evaluation.outcomes import STANDS, ShardOutcome, save_outcome
from tla_service.registry.tracking import log_files
from tla_service.report.schema import Report, artifact_folder, write_report

IMAGES = 400


def fates(clean: int, autoattack: int, *, images: int = IMAGES, shuffle: int | None = None) -> ShardOutcome:
    """So many images right when clean, so many under AutoAttack; the first ones, or some at random."""
    order = np.arange(images) if shuffle is None else np.random.default_rng(shuffle).permutation(images)
    broken = {"clean": np.zeros(images, np.int64), "autoattack": np.zeros(images, np.int64)}
    broken["clean"][order[:clean]] = STANDS
    broken["autoattack"][order[:clean]] = 1
    broken["autoattack"][order[:autoattack]] = STANDS
    return ShardOutcome(np.arange(images), np.arange(images) % 10, broken)


def report_on(sha256: str, outcome: ShardOutcome, **changes: Any) -> Report:
    """A report that says what the fates say, unless told otherwise."""
    accuracy = {}
    for name in outcome.broken_at:
        found = class_accuracy(outcome.standing(name), outcome.labels, 10).overall
        accuracy[name] = {"estimate": found.estimate, "low": found.low, "high": found.high, "images": found.images}
    facts = {
        "model": {"uri": "models:/x/1", "weights_sha256": sha256, "architecture": "digits_cnn", "method": "tla"},
        "data": {"name": "digits", "images": len(outcome.labels), "fingerprint": "f00d", "class_names": []},
        "threat_model": {"norm": "linf", "epsilon": 0.15},
        "accuracy": accuracy,
        "attacks": {},
        "audit": {"trusted": True, "images": 100, "checks": []},
        "detection": {
            "auc": 0.9, "low": 0.8, "high": 0.95, "epsilon": 0.2, "num_correct": 5, "num_wrong": 5, "baselines": {},
            "settings": {},
        },
        "seed": 0,
        "settings": "abc",
        "seconds": 1.0,
        "hardware": "here",
    }  # fmt: skip
    return Report.model_validate(facts | changes)


def evaluate(
    packaged: Packaged, version: str, outcome: ShardOutcome, *, log_as: str | None = None, **changes: Any
) -> None:
    """Log a report for a registered version, as the evaluation job does."""
    found = MlflowClient(packaged.uri).get_model_version("tla-digits", version)
    sha256 = found.tags["weights_sha256"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_report(report_on(sha256, outcome, **changes), folder / "report.json")
        save_outcome(outcome, folder / "outcome.npz")
        home = artifact_folder(log_as or sha256)
        log_files(packaged.uri, packaged.run_id, {f"{home}/{path.name}": path for path in sorted(folder.iterdir())})


def register_another(packaged: Packaged, factor: float = 2.0) -> str:
    """A further version, with other weights; returns its number."""
    weights = {name: tensor * factor for name, tensor in packaged.network.state_dict().items()}
    return str(packaged.log(state_dict=weights).version)
