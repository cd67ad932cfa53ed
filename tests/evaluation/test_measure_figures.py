"""Pictures of the measures: what they say, without colours too, and at the edges."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from tla_service.evaluation import measure_figures
from tla_service.evaluation.detection import RocCurve, measure_detection
from tla_service.evaluation.geometry import Projection, ShiftRatios
from tla_service.evaluation.measure_figures import (
    PanelRow,
    class_map,
    pair_map,
    retrieval_panel,
    roc_curves,
    shift_bars,
)

NAMES = [f"class {klass}" for klass in range(12)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    seen: list[Figure] = []
    save = measure_figures._save

    def keep(figure: Figure, path: Path) -> None:
        seen.append(figure)
        save(figure, path)

    monkeypatch.setattr(measure_figures, "_save", keep)
    return seen


def result(seed: int, num_resamples: int = 20) -> RocCurve:
    random = np.random.default_rng(seed)
    correct = random.random(50) < 0.5
    return measure_detection(random.normal(size=50) + correct, correct, seed=0, num_resamples=num_resamples)


def test_roc_names_auc_and_interval(tmp_path: Path, drawn: list[Figure]) -> None:
    none = measure_detection(np.arange(3.0), np.ones(3, bool), seed=0)
    results = {"Gaussians": result(0), "softmax": result(1), "bare": result(2, 0), "void": none}
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
        f"bare: AUC {scores['bare'].auc:.3f}",
        "void: no AUC, every image is classified correctly (3 of 3)",
    ]
    assert len({str(line.get_linestyle()) + str(line._dash_pattern) for line in axes.lines[:4]}) == 4
    np.testing.assert_array_equal(axes.lines[1].get_xdata(), first.false_accepts)
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), first.true_accepts)
    assert axes.lines[0].get_xydata().tolist() == [[0, 0], [1, 1]]
    assert (tmp_path / "new" / "roc.png").stat().st_size > 5000
    with pytest.raises(ValueError, match="no results"):
        roc_curves({}, tmp_path / "roc.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_retrieval_judges_by_colour_and_mark(channels: int, tmp_path: Path, drawn: list[Figure]) -> None:
    query = np.full((1, channels, 4, 4), 0.25)
    found = np.stack([np.full((2, channels, 4, 4), value) for value in (0.5,)])
    clean = PanelRow(query, found, np.array([[2, 2]]))
    states = {"clean": clean, "attacked": PanelRow(2 * query, found + 0.25, np.array([[2, 5]]))}
    retrieval_panel(np.array([2]), states, NAMES, tmp_path / "panel.png")
    cells = drawn[0].axes
    assert [cell.get_xlabel() for cell in cells] == [
        "query: class 2", "✓ class 2", "✓ class 2", "query: class 2", "✓ class 2", "✗ class 5",
    ]  # fmt: skip
    assert [cell.get_ylabel() for cell in cells][::3] == ["clean", "attacked"]
    values = [float(np.asarray(cell.images[0].get_array()).ravel()[0]) for cell in cells]
    assert values == [0.25, 0.5, 0.5, 0.5, 0.75, 0.75]
    right, wrong = (cells[place].spines["left"] for place in (4, 5))
    assert right.get_edgecolor() != wrong.get_edgecolor()
    assert right.get_linestyle() != wrong.get_linestyle()
    with pytest.raises(ValueError, match="leading shapes"):
        retrieval_panel(
            np.array([2]), states | {"clean": clean._replace(neighbours=found[:, :1])}, NAMES, tmp_path / "x.png"
        )


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
    with pytest.raises(ValueError, match="no attacked"):
        class_map(projection([], labels=1), NAMES, tmp_path / "map.png")


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
    with pytest.raises(ValueError, match="no ratios"):
        shift_bars({}, tmp_path / "bars.png")
