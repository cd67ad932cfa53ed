"""Evaluations of registered versions, with results of single images chosen by the test."""

import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow import MlflowClient

from tests.registry.tracking_server import Packaged
from tla_service.attacks import UNBROKEN
from tla_service.data.splits import gate_images
from tla_service.evaluation.results import class_accuracy
from tla_service.evaluation.shards import AutoAttackRun, ShardOutcome, save_outcome
from tla_service.report.schema import Report, ThreatModel, artifact_folder, write_report
from tla_service.tracking.runs import log_files

IMAGES = 400
TRAINED_FOR = ThreatModel(norm="linf", epsilon=0.15)
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")


def fates(clean: int, autoattack: int, *, images: int = IMAGES, shuffle: int | None = None) -> ShardOutcome:
    """So many images right when clean, so many under AutoAttack, a quarter of them images of the gate."""
    labels = np.arange(images) % 10
    gate = gate_images(torch.from_numpy(labels)).numpy()
    random = np.random.default_rng(shuffle)
    groups = [np.flatnonzero(mask) for mask in (gate, ~gate)]
    own, rest = [group if shuffle is None else random.permutation(group) for group in groups]
    broken = {"clean": np.zeros(images, np.int64), "autoattack": np.zeros(images, np.int64)}
    for group, share in ((own, 0.25), (rest, 0.75)):
        right, standing = (round(share * count) for count in (clean, autoattack))
        broken["clean"][group[:right]] = UNBROKEN
        broken["autoattack"][group[:right]] = 1
        broken["autoattack"][group[:standing]] = UNBROKEN
    return ShardOutcome(np.arange(images), labels, broken, gate=gate)


def accuracies(outcome: ShardOutcome) -> dict[str, dict[str, Any]]:
    """What a report says of these images."""
    found = {name: class_accuracy(outcome.standing(name), outcome.labels, 10) for name in outcome.broken_at}
    return {name: asdict(each) for name, each in found.items()}


def adaptive(auc: float, images: int) -> dict[str, Any]:
    """What a report says of attacks on a detector."""
    share = {"estimate": 0.1, "low": 0.0, "high": 0.2, "images": images}
    selective = {"coverage": share, "accuracy": share, "evaded": share, "aurc": 0.1}
    return {
        "auc": auc, "low": auc - 0.1, "high": auc + 0.1, "epsilon": 0.15, "threshold": 1.0,
        "threshold_from": "validation", "images": images, "unaware": {"auc": 0.9, "low": 0.8, "high": 0.95},
        "rejected": share, "false_rejections": share,
        "selective": dict.fromkeys(("clean", "unaware", "adaptive"), selective),
    }  # fmt: skip


def report_on(sha256: str, outcome: ShardOutcome, threat: ThreatModel = TRAINED_FOR, **changes: Any) -> Report:
    """A report that says what the images' results say, unless told otherwise."""
    detection = {
        "auc": 0.9, "low": 0.8, "high": 0.95, "epsilon": 0.2, "num_correct": 150, "num_wrong": 50, "baselines": {},
        "settings": {}, "adaptive": adaptive(0.8, 100),
    }  # fmt: skip
    gap = {"difference": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0, "images": len(outcome.labels)}
    facts: dict[str, Any] = {
        "model": {
            "uri": "models:/x/1", "weights_sha256": sha256, "architecture": "digits_cnn", "method": "tla",
            "trained_for": TRAINED_FOR,
        },
        "data": {"name": "digits", "images": len(outcome.labels), "fingerprint": "f00d", "class_names": []},
        "threat_model": threat,
        "attacks": {
            "pgd": {
                "kind": "pgd", "norm": threat.norm, "epsilon": threat.epsilon, "step_size": 0.1, "num_steps": 20,
                "num_restarts": 1,
            }
        },
        "autoattack": {
            "stages": STANDARD, "left_out": {}, "broken_by": {}, "strongest": "pgd", "gap": gap, "weak": False,
            "version": "standard",
        },
        "audit": {"trusted": True, "images": 100, "checks": []},
        "unit_tests": {
            "images": 64, "random": {"estimate": 0.0, "low": 0.0, "high": 0.1, "images": 64}, "attacks": [], "bar": 0.8,
        },
        "relatives": [{"source": "natural", "about": "small_cnn", "why": "is not here"}],
        "detection": detection,
        "seed": 0,
        "settings": "abc",
        "seconds": 1.0,
        "hardware": "here",
    }  # fmt: skip
    assert outcome.gate is not None
    facts["accuracy"] = accuracies(outcome.only(~outcome.gate))
    own = accuracies(outcome.only(outcome.gate))
    facts["gate"] = {"images": int(outcome.gate.sum()), "accuracy": own, "detection": detection}
    return Report.model_validate(facts | changes)


def evaluate(
    packaged: Packaged,
    version: str,
    outcome: ShardOutcome,
    *,
    threat: ThreatModel = TRAINED_FOR,
    run: AutoAttackRun | None = None,
    log_as: str | None = None,
    folder: str | None = None,
    **changes: Any,
) -> None:
    """Log a report for a registered version, as the evaluation job does.

    Args:
        packaged: Where.
        version: Its number.
        outcome: Results of the images.
        threat: What it was evaluated under.
        run: How AutoAttack was run; None: as the threat model says.
        log_as: Weights that it claims to be of.
        folder: Artifact folder; None: the one it belongs into.
        changes: Other fields of the report.
    """
    found = MlflowClient(packaged.uri).get_model_version("tla-digits", version)
    sha256 = found.tags["weights_sha256"]
    run = run or AutoAttackRun("standard", threat.norm, threat.epsilon, STANDARD)
    outcome = replace(outcome, autoattack=run)
    home = folder or artifact_folder(log_as or sha256, threat)
    with tempfile.TemporaryDirectory() as scratch:
        files = Path(scratch)
        write_report(report_on(sha256, outcome, threat, **changes), files / "report.json")
        save_outcome(outcome, files / "outcome.npz")
        log_files(packaged.uri, packaged.run_id, {f"{home}/{path.name}": path for path in sorted(files.iterdir())})


def register_another(packaged: Packaged, factor: float = 2.0, **changes: object) -> str:
    """A further version, with other weights; returns its number."""
    weights = {name: tensor * factor for name, tensor in packaged.network.state_dict().items()}
    return str(packaged.log(state_dict=weights, **changes).version)
