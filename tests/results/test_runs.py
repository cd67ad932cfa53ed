"""What a table trains and measures, in which order, and what is refused."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.results.conftest import settings_of
from tla_service.config import RunConfig
from tla_service.config.loading import load_settings, read_settings
from tla_service.errors import ConfigError, UnavailableError
from tla_service.report.settings import ReportSettings
from tla_service.results.runs import (
    REPORT,
    TableRun,
    read_row,
    run_config,
    table_runs,
    table_space,
    write_report_settings,
)
from tla_service.results.settings import ReproduceSettings
from tla_service.training.checkpoint import MANIFEST
from tla_service.tuning.settings import SweepConfig
from tla_service.tuning.space import Space


def report_of(settings: ReproduceSettings, run: TableRun, state: Path) -> ReportSettings:
    """The settings of a run's evaluation, once it and its surrogate are trained."""
    for name in (run.name, run.surrogate):
        for step in ("step-000000004", "step-000000008") if name is not None else ():
            folder = state / name / "checkpoints" / step
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MANIFEST).write_text("{}")
    report = read_settings(ReportSettings, ["--config", str(write_report_settings(settings, run, state))])
    assert report.model == str(state / run.name / "checkpoints" / "step-000000008")
    return report


@pytest.mark.parametrize("table", ["mnist", "cifar10", "tiny_imagenet"])
def test_without_a_budget_runs_are_the_presets(table: str, tmp_path: Path) -> None:
    settings = settings_of("--table", table, "--data.root", "/data")
    preset = load_settings(["--preset", table, "--data.root", "/data"]).run_config
    runs = table_runs(settings)
    space = table_space(settings, runs)
    for run in runs:
        ours = run_config(space, run)
        assert ours.training == preset.training
        assert ours.loss == preset.loss
        assert (ours.method, ours.seed) == (run.method, run.seed)
        assert ours.mining.pool_size == preset.mining.pool_size
    report = report_of(settings, runs[0], tmp_path)
    assert report.attacks == {}  # the paper's columns, transfer attacks included
    assert report.surrogate == str(tmp_path / "natural-s1" / "checkpoints" / "step-000000008")


@pytest.mark.parametrize("table", ["mnist", "cifar10", "tiny_imagenet"])
def test_the_modern_recipe_is_its_preset_for_every_method(table: str) -> None:
    settings = settings_of("--table", table, "--recipe", "modern", "--data.root", "/data")
    todo = table_runs(settings)
    space = table_space(settings, todo)
    assert [run.method for run in todo] == ["at", "trades", "tla"] * 3
    preset = load_settings(["--preset", f"modern_{table}", "--data.root", "/data"]).run_config
    for run in todo:
        ours = run_config(space, run)
        assert (ours.training, ours.optimizer, ours.attack) == (preset.training, preset.optimizer, preset.attack)
        weights = {"trades": 1.0 if table == "mnist" else 6.0, "tla": 6.0 if table == "cifar10" else 0.0}
        assert ours.robust_weight == weights.get(run.method, 0.0)
    assert settings.state_folder.name == f"{table}-modern"
    assert settings.page.name == f"{table}-modern.md"


@pytest.mark.parametrize("table", ["mnist", "cifar10", "tiny_imagenet", "digits"])
def test_a_budget_shortens_all_runs_alike(table: str, tmp_path: Path) -> None:
    root = () if table == "digits" else ("--data.root", "/data")
    settings = settings_of("--table", table, "--budget", "60", *root)
    todo = table_runs(settings)
    space = table_space(settings, todo)
    runs = [run_config(space, run) for run in todo]
    assert {run.training.max_steps for run in runs} == {215}
    assert len({run.model.name for run in runs}) == 1
    report = report_of(settings, todo[0], tmp_path)
    assert (report.images.autoattack, report.images.bank, report.page) == (500, 5000, False)
    assert {attack.num_restarts for attack in report.attacks.values()} == {1}
    assert {report.surrogate, *(run.surrogate for run in todo)} == {None}  # no transfer attack would use it


def test_seeds_come_one_after_another_and_lend_surrogates() -> None:
    found = table_runs(settings_of("--table", "digits", "--seeds", "2"))
    assert [run.seed for run in found] == [0] * 6 + [1] * 6
    assert {run.name: run.surrogate for run in found}["tla-s1"] == "tla-s0"
    alone = table_runs(settings_of("--table", "digits", "--seeds", "1"))[0]
    assert alone.surrogate is None


def test_an_unfinished_evaluation_with_another_surrogate_begins_anew(tmp_path: Path) -> None:
    shards = tmp_path / "natural-s0" / "report" / "shards"
    for count, is_kept in (("1", True), ("1", True), ("2", False), ("2", True)):
        settings = settings_of("--table", "digits", "--seeds", count)
        shards.mkdir(parents=True, exist_ok=True)
        report_of(settings, table_runs(settings)[0], tmp_path)
        assert shards.exists() == is_kept, "as many seeds give the same surrogate"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("report.json", b"["),
        ("outcome.npz", b"["),
        ("outcome.npz", None),
        ("autoattack.npz", b"["),
        ("autoattack.npz", None),
    ],
)
def test_a_result_that_is_damaged_or_gone_says_how_it_is_made_again(
    name: str, content: bytes | None, finished: Callable[..., None], tmp_path: Path
) -> None:
    finished(tmp_path, "tla-s0", clean=0.9, robust=0.5)
    run, path = TableRun("tla-s0", "tla", 0), tmp_path / "tla-s0" / REPORT / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UnavailableError, match=rf"{name}: cannot be read .*; delete {path.parent} and give the same"):
        read_row("TLA", [run], tmp_path)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--table mnist", "data.root=None: mnist is not embedded; give a folder"),
        ("--table digits --methods at --methods at", "methods=at,at: names a method twice"),
        ("--table digits --budget 0", "budget=0: .*greater than 0"),
        ("--table digits --scaling.address x:1 --scaling.wait_seconds 60", "side_by_side=None: with scaling.wait_sec"),
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
    todo = table_runs(settings)
    space = table_space(settings, todo)
    runs = [run_config(space, run) for run in todo]
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


def test_settings_that_do_not_go_together_are_refused() -> None:
    settings = settings_of("--table", "digits", "--scaling.num_workers", "200")
    with pytest.raises(ConfigError, match="under 2 images for each of 200 workers"):
        table_space(settings, table_runs(settings))
    base = RunConfig.model_validate(
        {"mining": {"pool": "separate", "scope": "global", "pool_size": 64}, "scaling": {"num_workers": 4}}
    )
    variants = {"a": {"mining.pool_size": 64}, "b": {"mining.pool_size": 62}}
    grid = SweepConfig.model_validate({"space": {"run": {"variants": variants}}, "searcher": "grid"})
    with pytest.raises(ConfigError, match=r"^sweep\.space\.run=b: no point .* \(mining\.pool_size=62: not divisible"):
        Space(base, grid)
