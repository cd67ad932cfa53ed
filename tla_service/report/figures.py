"""The figures of a report, each with a heading and a caption that says what to look for."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from tla_service.data import Dataset
from tla_service.data.augmentation import to_unit
from tla_service.data.sources import ImageSource
from tla_service.evaluation import measure_figures as mf
from tla_service.evaluation.beyond_figures import corruption_lines, reliability_diagram
from tla_service.evaluation.certified import certified_curve
from tla_service.evaluation.embedding import EmbeddedImages
from tla_service.evaluation.figures import PanelRow, attack_panel, retrieval_panel
from tla_service.evaluation.geometry import nearest, project, select_class, select_pair
from tla_service.inference.detector import Floats, Integers
from tla_service.report.findings import Findings
from tla_service.report.plan import Plan, radius_name
from tla_service.report.tables import accuracies

_SCORES = {"gaussian": "class Gaussians", "max_softmax": "max softmax", "neighbours": "k-th neighbour"}
_CIFAR_DEER, _CIFAR_TRUCK_AND_BIRD = 4, (9, 2)
_FEWEST_POINTS = 20  # t-SNE of fewer shows nothing


class ReportFigure(NamedTuple):
    """A figure of the page: PNG file, section, heading, and a caption that says what it shows and what to look for."""

    path: Path
    section: str
    title: str
    caption: str


class Figures:
    """Draws the figures of a report into a folder, which is made."""

    def __init__(self, folder: Path, found: Findings, plan: Plan, class_names: tuple[str, ...]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._found, self._plan, self._names = folder, found, plan, class_names
        self.drawn: list[ReportFigure] = []

    def _add(self, name: str, section: str, title: str, caption: str) -> Path:
        path = self._folder / f"{name}.png"
        self.drawn.append(ReportFigure(path, section, title, caption))
        return path

    def accuracy(self) -> None:
        """Accuracy by class under each attack."""
        table = accuracies(self._found, self._plan, len(self._names))
        caption = "Accuracy by class and attack in percent, the weakest class on top."
        mf.class_heat_map(table, self._names, self._add("classes", "accuracy", "By class", caption))

    def curves(self) -> None:
        """Accuracy along radius, steps and restarts."""
        about = {
            "epsilon": (
                "Against the radius",
                "Iterative attacks must be the stronger ones and reach zero as the radius grows; where they do not, "
                "gradients mislead.",
            ),
            "steps": (
                "Against gradient steps",
                "A curve that still falls at its right end asks for more steps; bands are 95% intervals.",
            ),
            "restarts": ("Against restarts", "What each further random start breaks, worst start per image."),
        }
        for axis, (title, caption) in about.items():
            curves = {curve.attack.partition(": ")[2]: curve for curve in self._found.curves if curve.axis == axis}
            marked = (self._plan.epsilon, f"ε = {self._plan.epsilon:.4g}") if axis == "epsilon" else None
            if curves:
                mf.accuracy_curves(curves, self._add(f"accuracy_{axis}", "curves", title, caption), marked=marked)
        for found in self._found.norms:
            what = "values changed" if found.norm == "l0" else "absolute changes"
            caption = (
                f"Share of images without a successful perturbation of that size, by the smallest that FMN found "
                f"({what}). The model was not trained for this norm."
            )
            path = self._add(f"accuracy_{found.norm}", "sparse", f"Against {found.norm.upper()} perturbations", caption)
            mf.accuracy_curves({"FMN": found.curve}, path)

    def beyond(self) -> None:
        """Accuracy under corruptions, and calibration."""
        found = self._found
        if found.corruptions is not None:
            caption = "Accuracy at the five severities of each corruption, the corruption that costs most on top."
            corruption_lines(found.corruptions, self._add("corruptions", "corruptions", "By corruption", caption))
        if found.calibration:
            caption = "Below the diagonal the network is overconfident. Larger marks stand for more images."
            path = self._add("calibration", "calibration", "Reliability", caption)
            reliability_diagram({str(name): each for name, each in found.calibration.items()}, path)

    def certified(self) -> None:
        """Certified accuracy along the radius, beside clean and AutoAttack accuracy."""
        if self._found.certified is None:
            return
        caption = (
            "Certified accuracy bounds that of the smoothed classifier from below, AutoAttack's bounds that of the "
            "network from above; what is true in between is unknown."
        )
        path = self._add("certified", "certified", "Certified, under AutoAttack and clean", caption)
        certified_curve(self._found.certified, self._plan.norm, self._plan.epsilon, path)

    def detection(self) -> None:
        """ROC curves of the detection scores."""
        if not self._found.rocs:
            return
        caption = (
            f"Natural and attacked test images together, ε = {self._plan.detection.epsilon:.4g}; positives are the "
            "correctly classified ones."
        )
        path = self._add("detection", "detection", "Misclassified images", caption)
        mf.roc_curves({_SCORES[name]: result for name, result in self._found.rocs.items()}, path)
        if self._found.risks:
            caption = (
                f"Share misclassified among the accepted images, by coverage; ε = {self._plan.epsilon:.4g}. "
                "An adaptive attack that raises the left end defeats the detector at every threshold."
            )
            mf.risk_curves(self._found.risks, self._add("risk_coverage", "adaptive", "Risk and coverage", caption))

    def shift(self, models: Mapping[str, Findings]) -> None:
        """Shift ratios of this model and those it is compared with, by name."""
        if not self._found.shift:
            return
        ratios = {
            f"{name}\nε = {epsilon:.3g}": shift
            for name, each in models.items()
            for epsilon, shift in each.shift.items()
        }
        caption = (
            "r compares attacked images misclassified as a class with its natural images, r' those crafted from it; "
            "both over the spread of the natural images."
        )
        mf.shift_bars(ratios, self._add("shift", "shift", "Shift ratios", caption))

    def maps(self, data_name: str) -> None:
        """t-SNE of one class and of one pair."""
        pictures = self._plan.settings.pictures
        attacked_name = radius_name(self._plan.epsilon)
        if attacked_name not in self._found.embedded:
            return
        natural, attacked = (self._found.embedded[name].embedded for name in ("natural", attacked_name))
        confusion = np.zeros((len(self._names), len(self._names)), dtype=np.int64)
        np.add.at(confusion, (attacked.labels, attacked.predictions), 1)
        np.fill_diagonal(confusion, 0)
        is_cifar = data_name == "cifar10"
        klass, pair = pictures.tsne_class, pictures.tsne_pair
        if klass is None:
            klass = _CIFAR_DEER if is_cifar else int(confusion.sum(1).argmax())
        if pair is None:
            pair = _CIFAR_TRUCK_AND_BIRD if is_cifar else divmod(int(confusion.argmax()), len(self._names))
        chosen = select_class(natural, attacked, klass)
        if sum(map(len, chosen)) >= _FEWEST_POINTS:
            caption = (
                "Natural images and attacked ones by prediction (Fig. 1): attacked images inside the class's own "
                "cloud are those that the metric holds."
            )
            path = self._add("class_map", "shift", f"t-SNE of class {self._names[klass]}", caption)
            mf.class_map(project(*chosen, seed=self._plan.seed), self._names, path)
        if pair[0] != pair[1]:
            chosen = select_pair(natural, attacked, *pair)
            if sum(map(len, chosen)) >= _FEWEST_POINTS:
                title = f"t-SNE of {self._names[pair[0]]} attacked into {self._names[pair[1]]}"
                caption = "Natural images of both classes and the attacked ones that cross over (Fig. 2)."
                path = self._add("pair_map", "shift", title, caption)
                mf.pair_map(project(*chosen, seed=self._plan.seed), *pair, self._names, path)

    def queries(self, attacked: EmbeddedImages, dataset: Dataset) -> None:
        """Retrieval panel and attack panel of a few test images."""
        bank, natural = self._found.embedded["bank"], self._found.embedded["natural"]
        place = {int(row): at for at, row in enumerate(natural.rows)}
        clean = natural.embedded.subset(np.array([place[int(row)] for row in attacked.rows]))

        def fetch(source: ImageSource, rows: Integers) -> Floats:
            pixels: Floats = to_unit(source.fetch(torch.from_numpy(rows.reshape(-1)))).numpy()
            return pixels.reshape(*rows.shape, *pixels.shape[1:])

        pixels = fetch(dataset.test, attacked.rows)
        states = {}
        count, metric = min(3, len(bank.embedded)), self._plan.settings.neighbours.metric
        for state, images, embedded in (("clean", pixels, clean), ("attacked", attacked.pixels, attacked.embedded)):
            rows, _ = nearest(embedded.embeddings, bank.embedded.embeddings, count, metric=metric)
            states[state] = PanelRow(images, fetch(dataset.train, bank.rows[rows]), bank.embedded.labels[rows])
        caption = (
            "Each query clean, then attacked; a solid frame and a tick mark neighbours of the query's class (Fig. 4)."
        )
        path = self._add("retrieval", "neighbours", "Nearest training images", caption)
        retrieval_panel(clean.labels, states, self._names, path)
        caption = f"Test images, what {self._plan.iterative} (one start) makes of them, and the difference."
        path = self._add("attack", "accuracy", "Attacked images", caption)
        predictions = clean.predictions.tolist(), attacked.embedded.predictions.tolist()
        attack_panel(pixels, attacked.pixels, clean.labels.tolist(), *predictions, self._names, path)
