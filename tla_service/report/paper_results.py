"""The paper's own figures, shown next to ours where the setting is the same (Mao et al. 2019, Tables 1-4, Fig. 5).

Accuracies and areas are percentages, as printed. None is ever taken for a figure of ours.
"""

from typing import NamedTuple

from tla_service.evaluation.paper_columns import paper_columns

_ARCHITECTURES = {"mnist": "mnist_cnn", "cifar10": "wrn_32_10", "tiny_imagenet": "tiny_resnet50_stride2"}
_TEST_IMAGES = 10_000
_ACCURACY = {
    "mnist": {
        "natural": (99.20, 34.48, 0, 0, 0, 0, 0, 0, 81.81),
        "at": (99.24, 97.31, 95.95, 96.66, 96.58, 94.82, 93.87, 95.47, 96.67),
        "alp": (98.91, 97.34, 96.00, 96.50, 96.62, 95.06, 94.93, 95.41, 96.95),
        "tla_rn": (99.50, 98.12, 97.17, 97.17, 97.64, 97.07, 96.73, 96.84, 97.69),
        "tla_sa": (99.44, 98.14, 97.08, 97.45, 97.50, 96.78, 95.64, 96.45, 97.65),
        "tla": (99.52, 98.17, 97.32, 97.25, 97.72, 96.96, 96.79, 96.64, 97.73),
    },
    "cifar10": {
        "natural": (95.01, 13.35, 0, 0, 0, 0, 0, 0, 7.60),
        "at": (87.14, 55.63, 48.29, 46.97, 49.79, 45.72, 45.21, 45.16, 62.83),
        "alp": (89.79, 60.29, 50.62, 47.59, 51.89, 48.50, 45.98, 45.97, 67.27),
        "tla_rn": (81.02, 55.41, 51.44, 49.66, 52.50, 49.94, 45.55, 49.63, 65.96),
        "tla_sa": (86.19, 58.80, 52.19, 49.64, 53.53, 49.70, 49.15, 49.29, 61.67),
        "tla": (86.21, 58.88, 52.60, 50.69, 53.87, 51.59, 50.03, 50.09, 70.63),
    },
    "tiny_imagenet": {
        "natural": (53.85, 8.07, 0.69, 0.04, 0.84, 0.39, 0, 0, 27.08),
        "at": (34.60, 19.34, 13.66, 11.42, 13.79, 13.46, 13.33, 13.57, 19.62),
        "alp": (43.20, 19.85, 11.24, 9.70, 11.37, 10.87, 10.59, 10.75, 22.08),
        "tla_rn": (35.88, 19.93, 14.08, 11.42, 14.23, 13.89, 13.65, 11.29, 20.27),
        "tla_sa": (34.91, 19.42, 13.57, 11.34, 13.75, 13.33, 13.19, 13.22, 19.90),
        "tla": (36.79, 20.95, 14.89, 12.47, 15.05, 14.65, 14.43, 14.74, 21.09),
    },
}
_Votes = tuple[float, float] | None
# (r, r') at the smaller and at the larger radius, neighbours (attacked, clean), detection.
_MEASURES: dict[str, dict[str, tuple[tuple[float, float], tuple[float, float], _Votes, float]]] = {
    "mnist": {
        "natural": ((1.485, 1.071), (1.194, 2.159), None, 94.83),
        "at": ((1.288, 1.004), (1.308, 1.042), (93.01, 98.68), 91.25),
        "alp": ((1.398, 1.006), (1.394, 1.068), (95.2, 98.43), 89.77),
        "tla": ((1.81, 1.005), (1.847, 1.072), (96.98, 99.47), 94.94),
    },
    "cifar10": {
        "natural": ((0.8082, 3.604), (0.9208, 3.682), None, 23.95),
        "at": ((1.053, 1.342), (1.007, 1.714), (47.46, 87.06), 61.07),
        "alp": ((1.038, 2.313), (1.21, 3.796), (48.85, 89.63), 63.15),
        "tla": ((1.093, 1.191), (1.39, 1.491), (51.74, 86.29), 69.6),
    },
    "tiny_imagenet": {
        "natural": ((0.9236, 1.284), (0.9293, 1.328), None, 50.12),
        "at": ((0.9774, 1.059), (0.9504, 1.2), (14.18, 30.27), 60.02),
        "alp": ((0.984, 1.076), (0.936, 1.216), (14.56, 38.14), 54.66),
        "tla": ((0.9979, 1.052), (0.9995, 1.2), (15.9, 35.88), 65.31),
    },
}
_LEVELS = {"mnist": (0.03, 0.3), "cifar10": (8 / 255, 25 / 255), "tiny_imagenet": (8 / 255, 25 / 255)}


class PaperRow(NamedTuple):
    """What the paper reports of a method on a data set, as printed, in percent, but for the shift ratios.

    `accuracy` by attack (Table 1), `shift` (r, r') by radius (Tables 2 and 3), `neighbours` attacked and clean
    (Table 4), `detection` (Fig. 5).
    """

    accuracy: dict[str, float]
    shift: dict[float, tuple[float, float]]
    neighbours: tuple[float, float] | None
    detection: float | None

    def at(self, epsilon: float) -> tuple[float, float] | tuple[str, str]:
        """(r, r') at a radius, or empty cells."""
        return next((pair for radius, pair in self.shift.items() if abs(radius - epsilon) < 1e-6), ("", ""))


def paper_row(data_name: str, method: str) -> PaperRow | None:
    """The paper's row of a method, or None where it has none."""
    accuracy = _ACCURACY.get(data_name, {}).get(method)
    if accuracy is None:
        return None
    columns = paper_columns(data_name)
    names = ("clean", *columns.attacks, *columns.transfer)
    named = {name: float(value) for name, value in zip(names, accuracy, strict=True)}
    measures = _MEASURES[data_name].get(method)
    if measures is None:
        return PaperRow(named, {}, None, None)
    small, large = _LEVELS[data_name]
    at_small, at_large, votes, detection = measures
    return PaperRow(named, {small: at_small, large: at_large}, votes, detection)


def differences_from_paper(data_name: str, architecture: str, images: int, *, same_attacks: bool) -> list[str]:
    """What sets a measurement apart from the paper's; `same_attacks` is about norm, radius and attacks."""
    if data_name not in _ACCURACY:
        return [f"the paper has no {data_name}"]
    differences = []
    if architecture != _ARCHITECTURES[data_name]:
        differences.append(f"the network is {architecture}, the paper's is {_ARCHITECTURES[data_name]}")
    if not same_attacks:
        differences.append("norm, radius or attacks are not the paper's")
    if images != _TEST_IMAGES:
        differences.append(f"{images} test images, the paper's {_TEST_IMAGES}")
    return differences
