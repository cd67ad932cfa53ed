"""What a sweep checks before its first trial."""

import errno
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.tuning.conftest import run_config, space_of
from tla_service.cluster.storage import Folder
from tla_service.config import RunConfig, ScalingConfig
from tla_service.config.loading import to_yaml
from tla_service.data import load_dataset
from tla_service.errors import ConfigError, UnavailableError
from tla_service.models import Architecture
from tla_service.tuning.settings import sweep_yaml
from tla_service.workflows import sweep
from tla_service.workflows.run import Facts, check_before_start
from tla_service.workflows.sweep import _check_began_with, _check_ends

TWO = ScalingConfig(num_workers=2)
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
    facts = Facts(load_dataset(config.data), Architecture.of(config.model), {}, (), 0, {}, {}, 1)
    with pytest.raises(ConfigError, match=r"sweep\.space\.(model\.\w+|start)=.*the same pretrained weights"):
        _check_ends(space_of(space, run=config), facts, 1)
    _check_ends(space_of({"loss.clean_weight": [0, 0.5]}, run=config), facts, 1)


def test_what_has_no_effect_on_the_pretrained_network_is_not_searched() -> None:
    config, name = run_config(**FINE), "training.freeze_batchnorm"
    facts = Facts(load_dataset(config.data), Architecture.of(config.model), {}, (), 0, {}, {}, 1)
    with pytest.raises(ConfigError, match=rf"^sweep\.space\.{name}=True: .*digits_cnn has no BatchNorm; leave it out"):
        _check_ends(space_of({name: [False, True]}, run=config), facts, 1)


def test_a_sweep_goes_on_with_the_data_code_and_weights_it_began_with(tmp_path: Path) -> None:
    storage, run = Folder(str(tmp_path)), run_config()
    began: dict[str, Any] = check_before_start(run).began_with | {
        "code_sha256": "a" * 64,
        "pretrained_sha256": "b" * 64,
    }
    _check_began_with(run, storage, began)
    storage.write(sweep.BEGAN_WITH, json.dumps(began).encode())
    _check_began_with(run, storage, json.loads(json.dumps(began)))
    fields = {
        "code_sha256": "model.code",
        "pretrained_sha256": "model.pretrained",
        "training_fingerprint": "data.root",
        "extra_fingerprint": "data.extra.path",
        "validation_fingerprint": "data.validation",
    }
    for name, field in fields.items():
        with pytest.raises(ConfigError, match=rf"^{field}[=:].* sweep began with.*choose another --sweep.name"):
            _check_began_with(run, storage, began | {name: "other"})
    for text in (b"{", b"[1]", b"3"):
        storage.write(sweep.BEGAN_WITH, text)
        with pytest.raises(UnavailableError, match=r"cannot be read .*; choose another --sweep.name"):
            _check_began_with(run, storage, began)


def test_a_sweep_that_never_began_may_begin_with_other_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = space_of({"loss.margin": [0.1, 0.2]})
    monkeypatch.setattr(sweep, "check_tracking", lambda _: None)
    monkeypatch.setattr(
        sweep, "check_disks", Mock(side_effect=UnavailableError("output", None, "is full", "free some"))
    )
    for sha256 in ("a" * 64, "b" * 64):
        facts = Mock(began_with={"code_sha256": sha256})
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


def test_another_winner_of_a_larger_sweep_is_trained_beside_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(sweep, "train_and_register", lambda _, folder, **__: seen.append(folder) or 130)
    space = space_of({"loss.margin": [0.1, 0.2]})
    (tmp_path / "best.yaml").write_text(to_yaml(space.run))
    for margin in (0.1, 0.2, 0.1):
        (tmp_path / "sweep.json").write_text(json.dumps({"run_id": "a", "winner": {"loss.margin": margin}}))
        assert sweep.train_winner(space, tmp_path, 1) == 130
    assert (len({*seen}), seen[0]) == (2, seen[2])
    assert {folder.name for folder in seen} == {"seed-0"}


def test_the_winners_figures_are_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(_run: RunConfig, folder: Path, **_: Any) -> int:
        folder.mkdir(parents=True, exist_ok=True)
        summary = {"clean_accuracy": 0.9, "robust_accuracy": {"pgd": 0.5}, "model_uri": "models:/m/1"}
        (folder / "summary.json").write_text(json.dumps(summary))
        return 0

    monkeypatch.setattr(sweep, "train_and_register", train)
    space = space_of({"loss.margin": [0.1, 0.2]})
    (tmp_path / "sweep.json").write_text(json.dumps({"run_id": "a", "winner": {"loss.margin": 0.2}}))
    (tmp_path / "best.yaml").write_text(to_yaml(space.run))
    assert sweep.train_winner(space, tmp_path, 2) == 0
    with monkeypatch.context() as full:
        full.setattr("os.fsync", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(UnavailableError, match=r"^output="):
            sweep.train_winner(space, tmp_path, 3)
    assert json.loads((tmp_path / sweep.SEEDS).read_text())["seeds"] == 2
    assert "±" in capsys.readouterr().out
    assert sweep.train_winner(space, tmp_path, 1) == 0  # one seed has no spread
    assert json.loads((tmp_path / sweep.SEEDS).read_text())["test"]["clean_accuracy"]["standard_deviation"] is None
    assert "±" not in capsys.readouterr().out


def test_trials_that_are_measured_go_on_under_the_same_test_attacks(tmp_path: Path) -> None:
    storage, measured = Folder(str(tmp_path)), {"searcher": "grid", "scheduler": "none", "measure_test": True}
    space = space_of({"loss.margin": [0.1, 0.2]}, **measured)
    storage.write(sweep.SETTINGS, sweep_yaml(space.run.model_copy(update={"scaling": TWO}), space.sweep).encode())
    sweep._compare(space.run, space, storage, resume=True)
    other = space.run.model_copy(update={"data": space.run.data.model_copy(update={"test_limit": 20})})
    with pytest.raises(ConfigError, match=r"^sweep\.name=.*has other settings"):
        sweep._compare(other, space, storage, resume=True)
