"""Finished runs with made-up figures, as the measuring process would have left them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tla_service.config.loading import read_settings
from tla_service.evaluation.outcomes import ShardOutcome, save_outcome
from tla_service.results.measure import AUTOATTACK, MEASURED, OUTCOME
from tla_service.results.settings import ReproduceSettings

IMAGES = 200


def settings_of(*flags: str) -> ReproduceSettings:
    return read_settings(ReproduceSettings, list(flags))


@pytest.fixture
def finished() -> Callable[..., None]:
    """Writes a finished run of given accuracies; image i stands under PGD where i is below the share."""

    def write(state: Path, name: str, clean: float, robust: float, auc: float | None = 0.8) -> None:
        folder = state / name
        folder.mkdir(parents=True)

        def share(value: float) -> dict[str, Any]:
            return {"estimate": value, "low": value - 0.1, "high": value + 0.1, "images": IMAGES}

        figures = {
            "accuracy": {"clean": share(clean), "pgd100": share(robust), "autoattack": share(robust - 0.05)},
            "detection": {"auc": auc},
            "neighbours": {"clean": {"estimate": clean}, "attacked": {"estimate": robust}},
            "shift": [{"epsilon": 0.3, "r": 1.25, "r_prime": 1.5}],
            "is_paper": False,
            "columns": ["pgd100"],
            "iterative": "pgd100",
            "device": "a processor, 2 cores",
            "code": "0123abcd",
            "seconds": {},
        }
        (folder / MEASURED).write_text(json.dumps(figures))
        rows = np.arange(IMAGES)
        fates = {name: np.where(rows < value * IMAGES, -1, 0) for name, value in (("clean", clean), ("pgd100", robust))}
        fates["autoattack"] = np.where(rows < (robust - 0.05) * IMAGES, -1, 0)
        save_outcome(ShardOutcome(rows, rows % 10, fates), folder / OUTCOME)
        save_outcome(ShardOutcome(rows, rows % 10, fates), folder / AUTOATTACK)

    return write
