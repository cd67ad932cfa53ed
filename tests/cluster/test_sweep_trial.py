"""How a trial ends badly: in one line, and at once where another attempt would end the same."""

from typing import Any

import pytest

from tla_service.cluster import sweep_trial
from tla_service.cluster.sweep_trial import _follow, reason_of
from tla_service.errors import UnavailableError
from tla_service.training.meter import NonFiniteLossError


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    monkeypatch.setattr(sweep_trial, "tell", records.append)
    return records


def test_running_out_of_memory_ends_a_trial_at_once(sent: list[dict[str, Any]]) -> None:
    told = "workers failed: {0: 'torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.'}"
    with pytest.raises(MemoryError, match="CUDA out of memory"):
        _follow({"event": "failure", "message": told})
    assert sent[0]["message"] == told


def test_other_failures_are_left_to_restarts(sent: list[dict[str, Any]]) -> None:
    _follow({"event": "failure", "message": "workers failed: {1: 'The actor died unexpectedly'}"})
    _follow({"event": "step", "loss": 1.0})
    assert [record["event"] for record in sent] == ["failure"]


def test_reasons_are_one_line() -> None:
    assert reason_of(NonFiniteLossError("the loss is not\nfinite")) == "the loss is not finite"
    assert reason_of(ValueError("a\n  b")) == "ValueError: a b"
    assert (
        reason_of(UnavailableError("data.root", "/x", "gone", "bring it back")) == "data.root=/x: gone; bring it back"
    )
