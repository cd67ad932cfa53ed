"""Finished runs with chosen results, as their evaluation would have left them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tla_service.config.loading import read_settings
from tla_service.evaluation.shards import ShardOutcome, save_outcome
from tla_service.report.schema import AUTOATTACK_FILE, OUTCOME_FILE, REPORT_FILE, Report, write_report
from tla_service.results.runs import REPORT
from tla_service.results.settings import ReproduceSettings

IMAGES = 1000


def settings_of(*flags: str) -> ReproduceSettings:
    return read_settings(ReproduceSettings, list(flags))


@pytest.fixture
def finished() -> Callable[..., None]:
    """Writes a finished run of given accuracies; image i is right under PGD if i is below that share.

    With `attacks_only` neither AutoAttack nor the representation was measured, as with later seeds of tuned tables.
    `transfer` is the accuracy under a transfer attack, None without one, as with a single seed.
    """

    def write(
        state: Path,
        name: str,
        clean: float,
        robust: float,
        auc: float = 0.8,
        warnings: Sequence[str] = (),
        attacks_only: bool = False,
        transfer: float | None = None,
    ) -> None:
        folder = state / name / REPORT
        folder.mkdir(parents=True)

        def share(value: float) -> dict[str, Any]:
            return {"estimate": value, "low": value - 0.1, "high": value + 0.1, "images": IMAGES}

        accuracy = {"clean": clean, "pgd100": robust, "worst": robust, "autoattack": robust - 0.05}
        threat: dict[str, Any] = {"norm": "linf", "epsilon": 0.3}
        attack = {"kind": "pgd", "step_size": 0.01, "num_steps": 100, "num_restarts": 1, **threat}
        attacks = {"pgd100": attack}
        if transfer is not None:
            accuracy["transfer_pgd100"], attacks["transfer_pgd100"] = transfer, attack | {"transfer": True}
        gap = {"difference": 0.05, "low": 0.0, "high": 0.1, "p_value": 0.1, "images": IMAGES}
        autoattack = {"stages": ["apgd-ce"], "left_out": {}, "broken_by": {}, "strongest": "pgd100", "gap": gap}
        report = Report.model_validate(
            {
                "model": {"uri": "x", "weights_sha256": "0" * 64, "architecture": "mnist_cnn", "method": "tla",
                          "trained_for": threat},
                "data": {"name": "mnist", "images": IMAGES, "fingerprint": "f00d", "class_names": []},
                "threat_model": threat,
                "accuracy": {name: share(value) for name, value in accuracy.items()},
                "attacks": attacks,
                "autoattack": {**autoattack, "version": "standard", "weak": False, "warnings": list(warnings)},
                "detection": {"auc": auc, "low": 0.7, "high": 0.9, "epsilon": 0.3, "num_correct": 1, "num_wrong": 1,
                              "baselines": {}, "settings": {}},
                "neighbours": {"k": 5, "bank": 9, "clean": share(clean), "attacked": share(robust)},
                "shift": [{"epsilon": 0.3, "r": 1.25, "r_prime": 1.5, "left_out_of_r": 0, "left_out_of_r_prime": 0}],
                "code": {"version": "1", "commit": "0123abcd"},
                "seed": 0, "settings": "abc", "seconds": 1.0, "hardware": "a processor, 2 cores",
                "gate": {"images": 250, "accuracy": {name: share(value) for name, value in accuracy.items()}},
            }
        )  # fmt: skip
        if attacks_only:
            left_out = {"autoattack": None, "detection": None, "neighbours": None, "shift": ()}
            report = report.model_copy(update=left_out)
        write_report(report, folder / REPORT_FILE)
        rows = np.arange(IMAGES)
        del accuracy["worst"]  # of all attacks together
        results = {name: np.where(rows < round(value * IMAGES), -1, 0) for name, value in accuracy.items()}
        strong = ShardOutcome(rows, rows % 10, {"autoattack": results.pop("autoattack")})
        save_outcome(ShardOutcome(rows, rows % 10, results), folder / OUTCOME_FILE)
        if not attacks_only:
            save_outcome(strong, folder / AUTOATTACK_FILE)

    return write
