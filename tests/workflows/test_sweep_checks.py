"""What a sweep checks before its first trial."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.tuning.conftest import run_config, space_of
from tla_service.cluster.storage import Folder
from tla_service.config import RunConfig
from tla_service.config.loading import to_yaml
from tla_service.data import load_dataset
from tla_service.errors import ConfigError, UnavailableError
from tla_service.models import Architecture
from tla_service.workflows import sweep
from tla_service.workflows.run import Facts
from tla_service.workflows.sweep import _check_code, _check_ends

FINE: dict[str, Any] = {"model": {"pretrained": "w.pt"}}


@pytest.mark.parametrize(
    ("run", "space"),
    [
        (FINE, {"model.name": ["digits_cnn", "mnist_mlp"]}),
        (FINE, {"model.head": ["keep", "new"]}),
        ({}, {"start": {"variants": {"random": {}, "trained": {"model.pretrained": "w.pt"}}}}),
    ],
)
def test_all_trials_start_from_the_same_weights(run: dict[str, Any], space: dict[str, Any]) -> None:
    config = run_config(**run)
    facts = Facts(load_dataset(config.data), Architecture.of(config.model), {}, (), 0, {})
    with pytest.raises(ConfigError, match=r"sweep\.space\.(model\.\w+|start)=.*the same pretrained weights"):
        _check_ends(space_of(space, run=config), facts, 1)
    _check_ends(space_of({"loss.clean_weight": [0, 0.5]}, run=config), facts, 1)


def test_a_sweep_goes_on_with_the_code_it_began_with(tmp_path: Path) -> None:
    storage, run = Folder(str(tmp_path)), run_config()
    _check_code(run, storage, None)
    _check_code(run, storage, "a" * 64)
    storage.write(sweep.CODE, b"a" * 64)
    _check_code(run, storage, "a" * 64)
    for other in ("b" * 64, None):
        with pytest.raises(ConfigError, match=r"^model\.code.*choose another --sweep.name"):
            _check_code(run, storage, other)


def test_a_sweep_that_never_began_may_begin_with_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = space_of({"loss.margin": [0.1, 0.2]})
    monkeypatch.setattr(sweep, "check_tracking", lambda _: None)
    monkeypatch.setattr(
        sweep, "check_disks", Mock(side_effect=UnavailableError("output", None, "is full", "free some"))
    )
    for sha256 in ("a" * 64, "b" * 64):
        facts = Mock(architecture=Mock(code_sha256=sha256))
        monkeypatch.setattr(sweep, "check_before_start", Mock(return_value=facts))
        with pytest.raises(UnavailableError, match="is full"):
            sweep.run_sweep(space.run, space, tmp_path, resume=False)


def test_the_winner_trains_with_the_credentials_that_its_file_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RunConfig] = []
    monkeypatch.setattr(sweep, "train_and_register", lambda run, *_, **__: seen.append(run) or 130)
    space = space_of({"loss.margin": [0.1, 0.2]}, run=run_config(tracking={"uri": "http://me:secret@mlflow:5000"}))
    (tmp_path / "sweep.json").write_text(json.dumps({"run_id": "abc", "winner": {"trial": 1, "loss.margin": 0.2}}))
    (tmp_path / "best.yaml").write_text(to_yaml(run_config(scaling={"num_workers": 3})))
    assert sweep.train_winner(space, tmp_path, 1) == 130
    (run,) = seen
    assert (run.loss.margin, run.scaling.num_workers, run.tracking.uri) == (0.2, 3, "http://me:secret@mlflow:5000")
    assert run.tracking.tags == {"mlflow.parentRunId": "abc"}
