"""Pictures: written at print resolution, without warnings, at the edges too."""

import struct
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from tla_service.evaluation import figures
from tla_service.evaluation.figures import PanelRow, attack_panel, retrieval_panel, training_curves

KEYS = (
    "train/loss",
    "train/cross_entropy",
    "train/triplet",
    "train/norm",
    "validation/clean_accuracy",
    "validation/robust_accuracy",
)


def history(*robust: float) -> list[dict[str, float]]:
    return [
        {"epoch": epoch, **dict.fromkeys(KEYS, 0.5), "validation/robust_accuracy": value}
        for epoch, value in enumerate(robust)
    ]


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


def dots_per_inch(path: Path) -> float:
    content = path.read_bytes()
    at = content.index(b"pHYs") + 4
    return float(struct.unpack(">I", content[at : at + 4])[0]) * 0.0254


def test_curves_mark_the_best_epoch(tmp_path: Path, drawn: list[Figure]) -> None:
    path = tmp_path / "new" / "curves.png"
    rows = history(0.2, 0.7, 0.6, 0.7)
    training_curves(rows, rows[1], path)
    assert dots_per_inch(path) >= 150
    losses, accuracies = drawn[0].axes
    assert [line.get_label() for line in losses.lines] == ["total", "cross-entropy", "triplet", "norm"]
    assert len({(line.get_linestyle(), line.get_marker()) for line in losses.lines}) == 4, "told apart without colours"
    star = next(line for line in accuracies.lines if line.get_marker() == "*")
    assert star.get_xydata().tolist() == [[1, rows[1]["validation/clean_accuracy"]], [1, 0.7]]
    assert "best weights, epoch 1" in accuracies.get_legend_handles_labels()[1]
    drawn[0].canvas.draw()
    assert "100%" in [label.get_text() for label in accuracies.get_yticklabels()]
    assert losses.get_xlabel() == "epoch"


@pytest.mark.parametrize(
    "rows",
    [
        history(0.4),
        [{"epoch": 0, "train/loss": 1.0}, {"epoch": 1, "train/loss": 0.5}],
        [{"epoch": 0}],
        [*history(0.1, 0.2), {"epoch": 2, "train/loss": float("nan"), "validation/robust_accuracy": float("nan")}],
        history(*np.linspace(0, 1, 200)),
    ],
    ids=["one epoch", "natural training", "nothing measured", "not finite", "long"],
)
def test_curves_at_the_edges(rows: list[dict[str, float]], tmp_path: Path) -> None:
    training_curves(rows, rows[0], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_an_empty_history_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty"):
        training_curves([], {}, tmp_path / "curves.png")


@pytest.mark.parametrize("channels", [1, 3])
def test_panel_shows_clean_perturbation_adversarial(channels: int, tmp_path: Path, drawn: list[Figure]) -> None:
    clean = np.full((2, channels, 8, 8), 0.5, dtype=np.float32)
    adversarial = clean.copy()
    adversarial[0, :, 0, 0] += 0.1
    adversarial[1, :, 0, 0] -= 0.05
    attack_panel(clean, adversarial, [0, 1], [0, 1], [1, 1], ["cat", "dog"], tmp_path / "panel.png")
    assert dots_per_inch(tmp_path / "panel.png") >= 150
    cells = drawn[0].axes
    assert [axes.get_title() for axes in cells[:3]] == ["clean", "perturbation × 5\n(largest 25.5/255)", "adversarial"]  # noqa: RUF001
    assert [axes.get_xlabel() for axes in cells] == ["✓ cat", "", "✗ dog", "✓ dog", "", "✓ dog"]
    amplified = [np.asarray(axes.images[0].get_array()).reshape(8, 8, -1)[0, 0, 0] for axes in (cells[1], cells[4])]
    np.testing.assert_allclose(amplified, [1.0, 0.25], atol=1e-5)


def test_panel_without_any_perturbation(tmp_path: Path) -> None:
    clean = np.zeros((1, 1, 8, 8), dtype=np.float32)
    attack_panel(clean, clean, [0], [0], [0], ["cat"], tmp_path / "panel.png")
    assert (tmp_path / "panel.png").stat().st_size > 5000


@pytest.mark.parametrize("channels", [1, 3])
def test_retrieval_judges_by_colour_and_mark(channels: int, tmp_path: Path, drawn: list[Figure]) -> None:
    query = np.full((1, channels, 4, 4), 0.25)
    found = np.stack([np.full((2, channels, 4, 4), value) for value in (0.5,)])
    clean = PanelRow(query, found, np.array([[2, 2]]))
    states = {"clean": clean, "attacked": PanelRow(2 * query, found + 0.25, np.array([[2, 5]]))}
    retrieval_panel(np.array([2]), states, [f"class {klass}" for klass in range(12)], tmp_path / "panel.png")
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


@pytest.mark.parametrize("name", ["US$ to CA$", r"$\frac{$", "$$", "<script>alert('x')</script>", 'a"b', "a\nb"])
def test_names_of_classes_are_no_formulas(name: str, tmp_path: Path) -> None:
    images = np.zeros((2, 1, 4, 4), np.float32)
    attack_panel(images, images, [0, 1], [0, 1], [1, 0], (name, "b"), tmp_path / "panel.png")
    assert dots_per_inch(tmp_path / "panel.png") >= 150
