"""One thread, one seed, and no configuration from outside, for every test."""

import os

import pytest
import torch
from hypothesis import settings

# Timings on a shared machine are no reason to fail; random cases are drawn afresh for every run.
settings.register_profile("tla", deadline=None)
settings.load_profile("tla")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in [name for name in os.environ if name.upper().startswith("TLA_")]:
        monkeypatch.delenv(variable)
