"""The recipe `tuned`: equal searches, selection on validation over two seeds, Holm's correction, and the page."""

import contextlib
import json
import random
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import get_args

import pytest
from scipy.stats import ttest_rel

from tests.results.conftest import settings_of
from tla_service.config import RunConfig
from tla_service.errors import ConfigError, UnavailableError
from tla_service.results import tuned
from tla_service.results.local import open_state
from tla_service.results.page import write_page
from tla_service.results.runs import (
    TableRun,
    is_finished,
    read_row,
    record_if_diverged,
    rounds,
    run_config,
    table_runs,
    table_space,
)
from tla_service.results.settings import ReproduceSettings, TableName
from tla_service.results.tuned_page import differences, holm
from tla_service.training.output import SUMMARY

Finished = Callable[..., None]
FLAGS = ("--table", "digits", "--recipe", "tuned", "--seeds", "3")


def score(state: Path, run: TableRun, value: float) -> None:
    """Finish a trial with a score on validation."""
    (state / run.name).mkdir(parents=True, exist_ok=True)
    summary = {"validation": {"validation/robust_accuracy": value}, "wall_seconds": {"train": 1700, "validation": 100}}
    (state / run.name / SUMMARY).write_text(json.dumps(summary))


def test_tables_with_a_protocol_are_those_that_the_settings_accept() -> None:
    for table in get_args(TableName):
        found = tuned.protocol(table)
        assert {each for compared in found.comparisons for each in (compared.row, compared.less)} <= set(found.arms)
        assert {arm.tuned_as for arm in found.arms.values()} - {None} <= set(found.searched)


def test_every_method_has_as_many_trials_with_the_same_shared_settings() -> None:
    found = tuned.protocol("mnist")
    points = {arm: tuned.trial_points("mnist", arm) for arm in found.searched}
    assert {len(each) for each in points.values()} == {found.trials}
    for name, dimension in found.shared.items():
        values = {tuple(point[name] for point in each) for each in points.values()}
        assert len(values) == 1
        (column,) = values
        assert len(set(column)) == found.trials
        assert all(dimension.low <= value <= dimension.high for value in column)  # type: ignore[operator]
    assert points["tla"] == points["tla_rn"] == points["tla_sa"]


@pytest.mark.parametrize(
    ("table", "images", "epochs", "short"),
    [("mnist", 3000, 2, 2), ("cifar10", 3000, 15, 3), ("tiny_imagenet", 1000, 30, 10)],
)
def test_every_run_of_the_protocol_is_valid_and_selected_on_enough_validation_images(
    table: str, images: int, epochs: int, short: int, tmp_path: Path
) -> None:
    settings = settings_of("--table", table, "--recipe", "tuned", "--data.root", "/data")
    trials = next(iter(rounds(settings, tmp_path)))
    space, shown = table_space(settings, trials), table_runs(settings)
    shorter = [run_config(space, run) for run in trials]
    shown_space = table_space(settings, shown)
    full = [run_config(shown_space, run) for run in shown]
    assert {config.training.epochs for config in shorter} == {short}
    assert {config.training.epochs for config in full} == {epochs}
    for config in shorter + full:
        assert config.evaluation.validation_margin
        assert config.evaluation.validation_limit == images
    assert {run.seed for run in trials}.isdisjoint(run.seed for run in shown)
    assert len({run.name for run in shown}) == len(shown)
    assert [run.row for run in shown if run.images["autoattack"]].count("tla") == tuned.protocol(table).full_seeds
    at_first = {run.row for run in shown if run.seed == shown[0].seed}
    assert at_first == {run.row for run in shown[: len(at_first)]} >= tuned.protocol(table).searched.keys()


def test_trials_of_other_searches_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial's number would stand for other settings."""
    settings, found = settings_of(*FLAGS, "--state", str(tmp_path)), tuned.protocol("digits")
    open_state(settings)
    open_state(settings)
    name = table_space(settings, table_runs(settings)).name
    arms = {arm: each.model_copy(update={"seeds": 9}) for arm, each in found.arms.items()}
    changes = [({"full_seeds": 2}, True), ({"arms": arms}, True), ({"trials": 3}, False), ({"repeated": 2}, False)]
    for change, fits in changes:
        monkeypatch.setattr(tuned, "protocol", {"digits": found.model_copy(update=change)}.__getitem__)
        with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match="other settings"):
            open_state(settings)
        assert (table_space(settings, table_runs(settings)).name == name) == fits  # of the trials' storage


def test_the_best_are_repeated_and_the_best_mean_of_two_seeds_wins(tmp_path: Path) -> None:
    settings = settings_of(*FLAGS)
    found = iter(rounds(settings, tmp_path))
    first = next(found)
    assert [run.name for run in first] == ["at-t0-s1000", "tla-t0-s1000", "at-t1-s1000", "tla-t1-s1000"]
    assert [run.is_trial for run in first] == [True] * 4
    with pytest.raises(UnavailableError, match="trials of at are missing"):
        table_runs(settings, tmp_path)
    for run, value in zip(first, (0.3, 0.6, 0.4, 0.5), strict=True):
        score(tmp_path, run, value)
        assert is_finished(run, tmp_path)
    second = next(found)
    assert [run.name for run in second] == ["at-t1-s1001", "tla-t0-s1001"]
    for run in second:
        score(tmp_path, run, 0.1)
    assert tuned.trial_deviation("digits", tmp_path) == pytest.approx(((0.3**2 + 0.5**2) / 4) ** 0.5)
    shown = next(found)
    weights = {run.fields["loss.triplet_weight"] for run in shown if run.row == "tla"}
    assert weights == {tuned.trial_points("digits", "tla")[0]["loss.triplet_weight"]}
    assert {run.fields["optimizer.learning_rate"] for run in shown if run.row == "at"} == {
        tuned.trial_points("digits", "at")[1]["optimizer.learning_rate"]
    }


@pytest.mark.parametrize("text", ["{", "[1]", '{"validation": null}'])
def test_a_trial_whose_summary_is_damaged_is_named(text: str, tmp_path: Path) -> None:
    found = settings_of(*FLAGS)
    trial = next(iter(rounds(found, tmp_path)))[0]
    (tmp_path / trial.name).mkdir()
    (tmp_path / trial.name / SUMMARY).write_text(text)
    with pytest.raises(UnavailableError, match=rf"{trial.name}/{SUMMARY}: cannot be read .*; delete it"):
        tuned.scored_trials("digits", trial.row.rpartition("-t")[0], tmp_path)


def test_with_two_seeds_the_mean_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = tuned.protocol("digits").model_copy(update={"repeated": 2})
    monkeypatch.setattr(tuned, "protocol", lambda _: both)
    settings = settings_of(*FLAGS)
    found = iter(rounds(settings, tmp_path))
    for run in next(found):
        score(tmp_path, run, {"t0": 0.6, "t1": 0.5}[run.name.split("-")[1]])
    for run in next(found):
        score(tmp_path, run, {"t0": 0.2, "t1": 0.5}[run.name.split("-")[1]])
    assert tuned.winner("digits", "tla", tmp_path).number == 1


def test_only_a_trial_that_diverged_counts_as_zero(tmp_path: Path) -> None:
    run = TableRun("at-t0-s1000", "at", 1000, is_trial=True)
    folder = tmp_path / run.name  # made with the record
    assert not record_if_diverged(folder, "training failed more than scaling.max_failures=3 times")
    assert not is_finished(run, tmp_path)
    reason = "training failed with exit code 1 (the loss is not finite by step 50; lower the rate)"
    assert record_if_diverged(folder, reason)
    assert is_finished(run, tmp_path)
    assert tuned.scored_trials("digits", "at", tmp_path)[0].scores == (0.0,)


def test_holm_rejects_what_the_closed_test_of_all_intersections_rejects() -> None:
    """Holm's procedure is the closure of Bonferroni's: a hypothesis falls if every intersection with it does."""
    draw = random.Random(0)
    for _ in range(50):
        p_values = [draw.random() ** 3 for _ in range(4)]
        adjusted = holm(p_values)
        for level in (0.01, 0.05, 0.2, 0.6):
            sets = [each for size in range(1, 5) for each in combinations(range(4), size)]
            for index in range(4):
                falls = all(min(p_values[i] for i in each) * len(each) <= level for each in sets if index in each)
                assert (adjusted[index] <= level) == falls


def test_the_page_has_corrected_verdicts_and_the_searches(tmp_path: Path, finished: Finished) -> None:
    settings = settings_of("--table", "mnist", "--recipe", "tuned", "--seeds", "5", "--data.root", "/data",
                           "--output", str(tmp_path / "page.md"))  # fmt: skip
    state, draw = tmp_path / "state", random.Random(1)
    at, tla = [0.60 + 0.01 * draw.random() for _ in range(5)], [0.70 + 0.01 * draw.random() for _ in range(5)]
    for seed in range(5):
        finished(state, f"at-s{seed}", 0.9, round(at[seed], 3))
        finished(state, f"tla-s{seed}", 0.9, round(tla[seed], 3))
    for run in next(iter(rounds(settings, state))):
        score(state, run, draw.random())
    space = table_space(settings, table_runs(settings))
    page = write_page(settings, space, state, state).read_text()
    (line,) = [line for line in page.splitlines() if line.startswith("| TLA less AT | pgd100 |")]
    cells = [cell.strip() for cell in line.split("|")]
    p = float(ttest_rel([round(each, 3) for each in tla], [round(each, 3) for each in at]).pvalue)
    assert cells[3:5] == ["5", "+2.92"]
    assert float(cells[7]) == pytest.approx(p * 4, rel=0.01)  # pgd100, autoattack, clean and detection
    assert cells[8] == "**better**"
    (row,) = [line for line in page.splitlines() if line.startswith("| TLA | 5 | 90.0 ")]
    assert "| **+9.9 [" in row
    (clean,) = [line for line in page.splitlines() if line.startswith("| TLA less AT | clean |")]
    assert "not separated" in clean
    assert "`python jobs/reproduce_paper.py --table mnist --seeds 5 --recipe tuned --data.root /data/mnist`" in page
    trials = tuned.protocol("mnist").trials
    assert f"Each of 8 methods had {trials} trials" in page
    found = [line.split(" | ")[0] for line in page.partition("## Accuracy")[2].splitlines() if line.startswith("| ")]
    assert found[1:5] == ["| AT", "| ALP", "| TRADES", "| MART"]
    assert (tmp_path / "pictures" / "mnist-tuned-trials.png").stat().st_size > 1000
    assert f"| MART | {trials} |" in page
    assert f"{8 * trials / 2:.1f} for the trials, 0.0 for training the winners" in page  # 1,800 s each; no clocks
    first = {arm: tuned.scored_trials("mnist", arm, state)[0] for arm in ("at", "tla")}
    gain = 100 * (first["tla"].scores[0] - first["at"].scores[0])
    (row,) = [line for line in page.splitlines() if line.startswith("| 0.0155 | 0.333 |")]
    assert row.split(" | ")[6] == f"{gain:+.1f}"  # after ALP, TRADES and MART


def test_differences_that_agree_to_the_digit_are_no_evidence(tmp_path: Path, finished: Finished) -> None:
    for seed, at in enumerate((0.6, 0.612)):
        finished(tmp_path, f"at-s{seed}", 0.9, at)
        finished(tmp_path, f"tla-s{seed}", 0.9, round(at + 0.01, 3))
    rows = {
        arm: read_row(arm, [TableRun(f"{arm}-s{seed}", arm, seed) for seed in range(2)], tmp_path)
        for arm in tuned.protocol("mnist").arms
    }
    (found,) = [each for each in differences("mnist", rows) if each.measure == "pgd100"]
    assert found.found.value == pytest.approx(0.01)
    assert found.p == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--table digits --budget 5", "budget=5: the recipe tuned fixes methods and lengths"),
        ("--table digits --methods at", "methods=.*: the recipe tuned fixes methods and lengths"),
    ],
)
def test_what_a_protocol_fixes_is_refused(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_of(*flags.split(), "--recipe", "tuned")


def test_other_recipes_have_one_round(tmp_path: Path) -> None:
    settings: ReproduceSettings = settings_of("--table", "digits")
    assert [len(runs) for runs in rounds(settings, tmp_path)] == [18]
    assert isinstance(table_space(settings, table_runs(settings)).run, RunConfig)
