"""Pictures of the suite: what they show, and at the edges."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from tla_service.evaluation import suite_figures
from tla_service.evaluation.intervals import class_accuracy, wilson_interval
from tla_service.evaluation.results import Accuracy, Axis, Curve
from tla_service.evaluation.suite_figures import accuracy_curves, class_bars, class_heat_map


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    seen: list[Figure] = []
    save = suite_figures._save

    def keep(figure: Figure, path: Path) -> None:
        seen.append(figure)
        save(figure, path)

    monkeypatch.setattr(suite_figures, "_save", keep)
    return seen


def curve(axis: Axis, x: tuple[float, ...], right: tuple[int, ...]) -> Curve:
    return Curve("pgd", axis, x, tuple(wilson_interval(count, 50) for count in right))


def by_class(per_class: list[int], images: int = 20) -> Accuracy:
    """So many right of each class; -1: the class has no images."""
    labels = [k for k, right in enumerate(per_class) for _ in range(images if right >= 0 else 0)]
    correct = [i < right for right in per_class for i in range(images if right >= 0 else 0)]
    return class_accuracy(np.array(correct), np.array(labels), len(per_class))


@pytest.mark.parametrize(
    ("axis", "x"), [("epsilon", (0.0, 0.1, 0.3)), ("steps", (0.0, 1.0, 2000.0)), ("restarts", (1.0, 2.0, 20.0))]
)
def test_curves_have_a_line_and_a_band_each(
    axis: Axis, x: tuple[float, ...], tmp_path: Path, drawn: list[Figure]
) -> None:
    curves = {"ours": curve(axis, x, (48, 30, 20)), "theirs": curve(axis, x, (49, 20, 1))}
    accuracy_curves(curves, tmp_path / "new" / "curves.png", marked=(x[1], "trained for"))
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["ours", "theirs", "trained for"]
    assert lines["ours"].get_xydata().tolist() == [
        [place, right / 50] for place, right in zip(x, (48, 30, 20), strict=True)
    ]
    assert len({(str(line.get_linestyle()), line.get_marker()) for line in lines.values()}) == 3
    band = axes.collections[1].get_paths()[0].vertices
    interval = wilson_interval(1, 50)
    at_end = sorted({y for place, y in band.tolist() if place == x[-1]})
    assert at_end[0] == pytest.approx(interval.low)
    assert at_end[-1] == pytest.approx(interval.high)
    assert axes.get_xlabel()
    drawn[0].canvas.draw()
    labels = [label.get_text() for label in axes.get_xticklabels()]
    if axis == "steps":
        assert labels[0] == "0"
        assert "2000" in labels
    if axis == "restarts":
        assert "1" in labels
        assert "0" not in labels


def test_curves_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one axis"):
        accuracy_curves({"a": curve("steps", (1.0,), (1,)), "b": curve("epsilon", (1.0,), (1,))}, tmp_path / "x.png")
    for count in (0, 6):
        with pytest.raises(ValueError, match="give one to 5"):
            accuracy_curves({str(i): curve("steps", (1.0,), (1,)) for i in range(count)}, tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_one_point_is_drawn(tmp_path: Path) -> None:
    accuracy_curves({"a": curve("restarts", (1.0,), (25,))}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_heat_map_puts_the_weakest_class_first(tmp_path: Path, drawn: list[Figure]) -> None:
    results = {"clean": by_class([20, 19, 18, -1]), "pgd": by_class([10, 2, 15, -1])}
    class_heat_map(results, ["cat", "dog", "owl", "ant"], tmp_path / "heat.png")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dog", "cat", "owl", "ant", "all classes"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["clean", "pgd"]
    cells = [text.get_text() for text in axes.texts]
    assert cells == ["95", "10", "100", "50", "90", "75", "-", "-", "95", "45"]


def test_heat_map_of_many_classes_leaves_names_out(tmp_path: Path, drawn: list[Figure]) -> None:
    names = [f"class {k}" for k in range(200)]
    class_heat_map({"pgd": by_class([k % 20 for k in range(200)])}, names, tmp_path / "heat.png")
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == ["all classes"]
    assert drawn[0].get_size_inches()[1] < 10
    class_bars(by_class([k % 20 for k in range(200)]), names, tmp_path / "bars.png")
    assert drawn[1].get_size_inches()[0] <= 16


def test_bars_are_the_accuracies_with_their_intervals(tmp_path: Path, drawn: list[Figure]) -> None:
    class_bars(by_class([10, 2, 15, -1]), ["a long name", "dog", "owl", "ant"], tmp_path / "bars.png")
    (axes,) = drawn[0].axes
    assert [patch.get_height() for patch in axes.patches[:4]] == [0.1, 0.5, 0.75, 0.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["dog", "a long name", "owl", "ant"]
    segment = axes.collections[0].get_segments()[0]
    interval = wilson_interval(2, 20)
    assert segment[:, 1].tolist() == pytest.approx([interval.low, interval.high])
    assert "all classes: 45.0%" in axes.get_legend_handles_labels()[1]


def test_classes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="with 3 classes"):
        class_heat_map({"pgd": by_class([1, 2])}, ["a", "b", "c"], tmp_path / "x.png")
    with pytest.raises(ValueError, match="2 classes and 3 names"):
        class_bars(by_class([1, 2]), ["a", "b", "c"], tmp_path / "x.png")
