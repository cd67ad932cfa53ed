"""Pictures of the measures: what they say, without colours too, and at the edges."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from tla_service.evaluation import figures
from tla_service.evaluation.detection import RocCurve, measure_detection
from tla_service.evaluation.geometry import Projection, ShiftRatios
from tla_service.evaluation.measure_figures import (
    accuracy_curves,
    class_heat_map,
    class_map,
    pair_map,
    roc_curves,
    shift_bars,
)
from tla_service.evaluation.results import Accuracy, Axis, Curve, class_accuracy, wilson_interval

NAMES = [f"class {klass}" for klass in range(12)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    seen: list[Figure] = []
    save = figures.save

    def keep(figure: Figure, path: Path) -> None:
        seen.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "save", keep)
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


def test_one_point_is_drawn(tmp_path: Path) -> None:
    accuracy_curves({"a": curve("restarts", (1.0,), (25,))}, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_heat_map_puts_the_weakest_class_first(tmp_path: Path, drawn: list[Figure]) -> None:
    results = {"clean": by_class([20, 19, 18, -1]), "pgd": by_class([10, 2, 15, -1])}
    class_heat_map(results, ["cat", "dog", "owl", "ant"], tmp_path / "heat.png")
    class_heat_map(results, ["cat", "US$ to CA$", r"$\frac{$", "$$"], tmp_path / "no_formulas.png")
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


def result(seed: int) -> RocCurve:
    random = np.random.default_rng(seed)
    correct = random.random(50) < 0.5
    return measure_detection(random.normal(size=50) + correct, correct, np.arange(50), seed=0)


def test_roc_names_auc_and_interval(tmp_path: Path, drawn: list[Figure]) -> None:
    none = measure_detection(np.arange(3.0), np.ones(3, bool), np.arange(3), seed=0)
    results = {"Gaussians": result(0), "softmax": result(1), "void": none}
    roc_curves(results, tmp_path / "new" / "roc.png")
    (axes,) = drawn[0].axes
    labels = axes.get_legend_handles_labels()[1]
    first, scores = results["Gaussians"], {name: result.score for name, result in results.items()}
    assert labels == [
        "chance",
        *(
            f"{n}: AUC {scores[n].auc:.3f} [{scores[n].low:.3f}, {scores[n].high:.3f}]"
            for n in ("Gaussians", "softmax")
        ),
        "void: no AUC, every image is classified correctly (3 of 3)",
    ]
    assert len({str(line.get_linestyle()) + str(line._dash_pattern) for line in axes.lines[:4]}) == 4
    np.testing.assert_array_equal(axes.lines[1].get_xdata(), first.false_accepts)
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), first.true_accepts)
    assert axes.lines[0].get_xydata().tolist() == [[0, 0], [1, 1]]
    assert (tmp_path / "new" / "roc.png").stat().st_size > 5000


def projection(predictions: list[int], labels: int | None = None) -> Projection:
    random = np.random.default_rng(0)
    said = np.array(predictions, np.int64)
    natural = np.array([1, 1, 2]) if labels is None else np.full(3, labels)
    return Projection(random.normal(size=(3, 2)), random.normal(size=(len(said), 2)), natural, said)


def test_class_map_groups_by_prediction(tmp_path: Path, drawn: list[Figure]) -> None:
    class_map(projection([1, 0, 0, 0, 1, 5], labels=1), NAMES, tmp_path / "map.png")
    (axes,) = drawn[0].axes
    assert axes.get_legend_handles_labels()[1] == [
        "natural class 1 (3)",
        "attacked, taken for class 0 (3)",
        "attacked, taken for class 1 (right) (2)",
        "attacked, taken for class 5 (1)",
    ]
    shapes = {tuple(map(tuple, dots.get_paths()[0].vertices.round(4))) for dots in axes.collections[1:]}
    assert len(shapes) == 3, "told apart without colours"


def test_class_map_of_many_predictions_gathers_the_rare_ones(tmp_path: Path, drawn: list[Figure]) -> None:
    class_map(projection([*range(12), *range(7)], labels=1), NAMES, tmp_path / "map.png")
    (axes,) = drawn[0].axes
    labels = axes.get_legend_handles_labels()[1]
    assert len(labels) == 9
    assert labels[-1] == "attacked, 5 other classes (5)"
    assert sum(len(dots.get_offsets()) for dots in axes.collections) == 3 + 19


@pytest.mark.parametrize("said", [[2, 2], []], ids=["some", "no attack leads there"])
def test_pair_map_shows_three_kinds(said: list[int], tmp_path: Path, drawn: list[Figure]) -> None:
    pair_map(projection(said), 1, 2, NAMES, tmp_path / "pair.png")
    (axes,) = drawn[0].axes
    assert axes.get_legend_handles_labels()[1] == [
        "natural class 1 (2)",
        "natural class 2 (1)",
        f"attacked class 1,\ntaken for class 2 ({len(said)})",
    ]


def test_bars_show_means_classes_and_what_is_left_out(tmp_path: Path, drawn: list[Figure]) -> None:
    nan = np.nan
    some, none = (
        ShiftRatios(np.array([1, 2, nan]), np.array([1, 2, 3.0])),
        ShiftRatios(np.full(3, nan), np.full(3, nan)),
    )
    shift_bars({"AT": some, "TLA": none}, tmp_path / "bars.png")
    left, right = drawn[0].axes
    assert [text.get_text() for text in left.texts] == ["1.500\nclasses left out: 1", "undefined"]
    assert [text.get_text() for text in right.texts] == ["2.000", "undefined"]
    assert [bar.get_height() for bar in right.patches] == [2.0]
    assert right.collections[0].get_offsets()[:, 1].tolist() == [1, 2, 3]
    assert [label.get_text() for label in left.get_xticklabels()] == ["AT", "TLA"]
