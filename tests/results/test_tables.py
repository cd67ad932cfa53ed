"""What a table trains and measures, in which order, and what is refused."""

import json
import os
import re
import signal
from pathlib import Path

import pytest

from tests.results.conftest import settings_of
from tla_service.config.loading import load_settings
from tla_service.errors import ConfigError
from tla_service.lock import locked_folder
from tla_service.results.places import LocalPlaces
from tla_service.results.reproduce import reproduce_here
from tla_service.results.schedule import Scheduler, open_state
from tla_service.results.tables import measures, run_config, units


@pytest.mark.parametrize("table", ["mnist", "cifar10", "tiny_imagenet"])
def test_without_a_budget_runs_are_the_presets(table: str) -> None:
    settings = settings_of("--table", table, "--data.root", "/data")
    preset = load_settings(["--preset", table, "--data.root", "/data"]).run_config
    for unit in units(settings):
        ours = run_config(settings, unit)
        assert ours.training == preset.training
        assert ours.loss == preset.loss
        assert (ours.method, ours.seed) == (unit.method, unit.seed)
        assert ours.mining.pool_size == (unit.pool_size or preset.mining.pool_size)
    assert "attacks" not in measures(settings, next(units(settings)))  # the paper's columns, transfer among them


@pytest.mark.parametrize("table", ["mnist", "cifar10", "tiny_imagenet"])
def test_the_modern_recipe_is_its_preset_for_every_method(table: str) -> None:
    settings = settings_of("--table", table, "--recipe", "modern", "--data.root", "/data")
    todo = list(units(settings))
    assert [unit.method for unit in todo] == ["at", "trades", "tla"] * 3
    preset = load_settings(["--preset", f"modern_{table}", "--data.root", "/data"]).run_config
    for unit in todo:
        ours = run_config(settings, unit)
        assert (ours.training, ours.optimizer, ours.attack) == (preset.training, preset.optimizer, preset.attack)
        assert ours.robust_weight == {"trades": 1.0 if table == "mnist" else 6.0}.get(unit.method, 0.0)
    assert settings.state_folder.name == f"{table}-modern"
    assert settings.page.name == f"{table}-modern.md"


@pytest.mark.parametrize("table", ["mnist", "cifar10", "tiny_imagenet", "digits"])
def test_a_budget_shortens_all_runs_alike(table: str) -> None:
    root = () if table == "digits" else ("--data.root", "/data")
    settings = settings_of("--table", table, "--budget", "60", *root)
    todo = list(units(settings))
    runs = [run_config(settings, unit) for unit in todo]
    assert {run.training.max_steps for run in runs} == {215}
    assert len({run.model.name for run in runs}) == 1
    assert measures(settings, todo[0])["images"]["autoattack"] == 500
    assert all(attack["num_restarts"] == 1 for attack in measures(settings, todo[0])["attacks"].values())


def test_seeds_come_one_after_another_and_lend_surrogates() -> None:
    found = [unit for unit in units(settings_of("--table", "digits", "--seeds", "2")) if unit.pool_size is None]
    assert [unit.seed for unit in found] == [0] * 6 + [1] * 6
    assert {unit.name: unit.surrogate for unit in found}["tla-s1"] == "tla-s0"
    alone = next(units(settings_of("--table", "digits", "--seeds", "1")))
    assert alone.surrogate is None


def test_the_next_stage_measures_before_it_trains_more(tmp_path: Path) -> None:
    settings = settings_of(
        "--table", "digits", "--seeds", "2", "--methods", "at", "--no-pools", "--state", str(tmp_path)
    )
    todo = list(units(settings))
    scheduler = Scheduler(settings, LocalPlaces(1), lambda _text: None)

    def upcoming() -> tuple[str, str] | None:
        found = scheduler._next(todo)
        return (found[0].name, found[1]) if found else None

    assert upcoming() == ("at-s0", "train")
    for name in ("at-s0", "at-s1"):
        assert upcoming() == (name, "train")  # the surrogate first
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.json").write_text("{}")
    assert upcoming() == ("at-s0", "measure")
    scheduler.failed["at-s0"] = "killed"
    assert upcoming() == ("at-s1", "measure")
    (tmp_path / "at-s1" / "measured.json").write_text("{}")
    assert upcoming() is None


def test_a_folder_of_another_table_is_refused(tmp_path: Path) -> None:
    open_state(settings_of("--table", "digits", "--budget", "5", "--state", str(tmp_path)))
    open_state(settings_of("--table", "digits", "--budget", "5", "--state", str(tmp_path), "--seeds", "9"))
    with pytest.raises(ConfigError, match="holds another table or other settings"):
        open_state(settings_of("--table", "digits", "--state", str(tmp_path)))
    assert json.loads((tmp_path / "table.json").read_text()) == {"table": "digits", "settings": "5-minutes"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--table mnist", "data.root=None: mnist is not embedded; give a folder"),
        ("--table digits --methods at --methods at", "methods=at,at: names a method twice"),
        ("--table digits --budget 0", "budget=0: .*greater than 0"),
        ("--table imagenet", "table=imagenet: .*not one of"),
    ],
)
def test_wrong_settings_are_refused(flags: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(*flags.split())
    assert re.match(message, str(caught.value))


@pytest.mark.parametrize("table", ["mnist", "cifar10", "tiny_imagenet"])
def test_the_shortened_modern_recipe_is_the_same_for_every_method(table: str) -> None:
    settings = settings_of("--table", table, "--recipe", "modern", "--budget", "22.5", "--data.root", "/data")
    runs = [run_config(settings, unit) for unit in units(settings)]
    assert [run.method for run in runs] == ["at", "trades", "tla"] * 3
    assert {run.training.max_steps for run in runs} == {215}
    first, preset = runs[0], load_settings(["--preset", f"modern_{table}", "--data.root", "/data"]).run_config
    for run in runs:
        assert (run.training, run.optimizer, run.attack, run.schedule) == (
            first.training, first.optimizer, first.attack, first.schedule,
        )  # fmt: skip
        assert run.optimizer.weight_decay == preset.optimizer.weight_decay
        assert run.loss.label_smoothing == preset.loss.label_smoothing
    assert settings.state_folder.name == f"{table}-modern-22.5-minutes"


def test_digits_have_no_modern_recipe() -> None:
    with pytest.raises(ConfigError, match="recipe=modern: there is no such preset for digits"):
        settings_of("--table", "digits", "--recipe", "modern")


def test_a_table_that_another_process_is_at_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    settings = settings_of("--table", "digits", "--state", str(tmp_path / "state"))
    with (
        locked_folder(tmp_path / "state", "state"),
        pytest.raises(ConfigError, match=rf"state={tmp_path}/state: in use by process {os.getpid()} on "),
    ):
        reproduce_here(settings)
