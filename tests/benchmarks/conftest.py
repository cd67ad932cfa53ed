"""What the benchmark's tests share."""

import multiprocessing
from types import SimpleNamespace

import pytest


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process is forked, and need not import anything."""
    made = SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"))
    monkeypatch.setattr("benchmarks.elsewhere.multiprocessing", made)
