"""Pictures are drawn from whatever trials there are; what they show is computed right."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from tests.tuning.conftest import run_config, space_of, trial_of
from tla_service.config.loading import read_settings
from tla_service.evaluation.paper import paper_figures
from tla_service.tuning.figures import _draw, _ours, draw_all
from tla_service.tuning.settings import TuneSettings
from tla_service.tuning.space import Space
from tla_service.tuning.trials import Trial


def trials_of(space: Space, count: int, seed: int = 0) -> list[Trial]:
    """Trials whose outcome depends on the margin alone, with some stopped and one failed."""
    rng = np.random.default_rng(seed)
    trials = []
    for number in range(count):
        point = space.random(rng)
        assert point is not None
        robust = 0.8 - 2 * abs(point["loss.margin"] - 0.08)
        status = "stopped" if number % 3 == 1 else "finished"
        trials.append(trial_of(number, [robust / 2, robust], point=point, status=status))
    trials[-1] = Trial(count - 1, trials[-1].point, "failed", reason="the loss is not finite")
    return trials


def test_every_picture_is_drawn_and_the_style_of_others_left_alone(tmp_path: Path) -> None:
    space, before = space_of(run=run_config(mining={"pool": "separate", "pool_size": 100})), dict(mpl.rcParams)
    paths = draw_all(trials_of(space, 12), space, tmp_path / "figures")
    assert {path.stem for path in paths} == {"parallel_coordinates", "clean_and_robust", "importance"}
    assert all(path.stat().st_size > 10_000 for path in paths)
    assert dict(mpl.rcParams) == before


def test_a_single_trial_and_none_are_drawn_too(tmp_path: Path) -> None:
    space = space_of()
    assert draw_all([], space, tmp_path) == []
    one = trials_of(space, 2)[:1]
    assert [path.stem for path in draw_all(one, space, tmp_path)] == ["parallel_coordinates", "clean_and_robust"]
    assert draw_all([Trial(0, one[0].point, "failed")], space, tmp_path) == []


def test_trials_that_do_not_differ_are_plotted_without_importances(tmp_path: Path) -> None:
    space = space_of()
    trials = [trial_of(trial.number, [0.5], point=trial.point, status="finished") for trial in trials_of(space, 5)]
    assert [path.stem for path in draw_all(trials, space, tmp_path)] == ["parallel_coordinates", "clean_and_robust"]


@pytest.mark.parametrize("study", ["layer", "margin", "pool_size", "triplet_weight"])
def test_each_study_covers_the_papers_values(study: str) -> None:
    settings = read_settings(TuneSettings, ["--study", study, "--data.root", "/data"])
    space = Space(settings.run_config, settings.sweep)
    paper = paper_figures()["studies"][settings.sweep.picture]["accuracies"]
    labels = [f"{choice:g}" if isinstance(choice, float) else str(choice) for choice in space.axes[0].choices]
    assert all(labels == list(line) for line in paper.values())
    assert len(settings.run_config.evaluation.test) >= len(paper)


def test_a_study_ends_in_its_picture(tmp_path: Path) -> None:
    settings = read_settings(TuneSettings, ["--study", "margin", "--data.root", "/data"])
    space, trials = Space(settings.run_config, settings.sweep), []
    for number, point in enumerate(space.grid()):
        trial = trial_of(number, [0.7], point=point, status="finished")
        trial.test = {f"robust_accuracy/{name}": 0.7 + number / 100 for name in settings.run_config.evaluation.test}
        trials.append(trial)
    path = tmp_path / f"{settings.sweep.picture}.png"
    assert path in draw_all(trials, space, tmp_path)
    assert path.stat().st_size > 10_000


def test_seeds_are_averaged() -> None:
    trials = [trial_of(n, [0.5], point={"loss.margin": 0.1, "seed": n}, status="finished") for n in range(2)]
    for trial, value in zip(trials, (0.6, 0.8), strict=True):
        trial.test = {"robust_accuracy/pgd": value, "clean_accuracy": 0.9}
    found = _ours(trials, "loss.margin")
    assert found == {"pgd": {"0.1": [0.6, 0.8]}}
    axes = Figure().subplots()
    _draw(axes, found, ["0", "0.1"])
    line, _, (bar,) = axes.containers[0].lines
    assert line.get_xydata().tolist() == [[1, pytest.approx(0.7)]]
    (low, high) = bar.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(0.1414, abs=1e-3)  # the standard deviation
