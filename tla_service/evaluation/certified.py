"""Certified accuracy by randomised smoothing: what the certificates of single images say together, and its picture."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tla_service.evaluation import figures as fg
from tla_service.evaluation.results import Curve, Share, share_of

ABSTAINED = -1
# One row per image: its number in the test set, true class, what the smoothed classifier predicts (`ABSTAINED`: nothing)
# and the certified L2 radius of that (0 then). `clean`: the network itself is right. `network_stands`: still right under
# an attack within that radius; `smoothed_stands`: the smoothed prediction survives an attack within it.
ROW = np.dtype(
    [
        ("index", np.int64),
        ("label", np.int64),
        ("predicted", np.int64),
        ("radius", np.float64),
        ("clean", np.bool_),
        ("network_stands", np.bool_),
        ("smoothed_stands", np.bool_),
    ]
)
Rows = npt.NDArray[np.void]
_POINTS = 40


@dataclass(frozen=True)
class Certified:
    """Certificates of the smoothed classifier: the network's majority vote under Gaussian noise of deviation `sigma`.

    Each holds with probability 1 - `alpha` over the noise, from `samples` draws. `accuracy` counts images that are
    classified correctly with a certificate, `at_threat` those certified up to the report's radius: in L2 as it is, in
    L-infinity up to the L2 radius over `scale`, the square root of the number of pixel values, since no shorter L2
    perturbation leaves that cube. `clean` and `autoattack` are of the network itself on the same images.

    `smoothed_broken` counts certified images on which an attack within their radius changed the smoothed prediction:
    a certificate says that there are none. The others are no contradictions, as certificates are not of the network:
    `network_broken`, the correctly certified images on which an attack within their radius breaks the network, and
    `autoattack_broken`, those certified at the report's radius that AutoAttack breaks.
    """

    images: int
    norm: Literal["linf", "l2"]
    sigma: float
    samples: int
    alpha: float
    scale: float
    accuracy: Share
    abstained: Share
    at_threat: Share
    clean: Share
    autoattack: Share | None
    median_radius: float | None
    curve: Curve
    smoothed_broken: int
    network_broken: int
    autoattack_broken: int | None


def summarise(
    rows: Rows,
    *,
    norm: Literal["linf", "l2"],
    epsilon: float,
    sigma: float,
    samples: int,
    alpha: float,
    values: int,
    standing: dict[int, bool] | None,
) -> Certified:
    """Summarise certificates of single images.

    `norm` and `epsilon` are the report's threat model, `values` is the number of values of an image (C x H x W), and
    `standing` tells of images by their numbers whether they stand under AutoAttack; None if it was not run.
    """
    scale = 1.0 if norm == "l2" else math.sqrt(values)
    right = rows["predicted"] == rows["label"]
    radii = np.where(right, rows["radius"], 0.0)
    at_threat = right & (radii >= epsilon * scale)
    x = (0.0, *np.linspace(0, radii.max(initial=0.0), _POINTS)[1:].tolist()) if radii.any() else (0.0,)
    curve = Curve("randomised smoothing", "l2", x, tuple(share_of(right & (radii >= radius)) for radius in x))
    attacked = np.array([standing is not None and int(index) in standing for index in rows["index"]], dtype=bool)
    stands = np.array([bool(standing and standing.get(int(index))) for index in rows["index"]], dtype=bool)
    return Certified(
        images=len(rows),
        norm=norm,
        sigma=sigma,
        samples=samples,
        alpha=alpha,
        scale=scale,
        accuracy=share_of(right),
        abstained=share_of(rows["predicted"] == ABSTAINED),
        at_threat=share_of(at_threat),
        clean=share_of(rows["clean"]),
        autoattack=share_of(stands[attacked]) if attacked.any() else None,
        median_radius=float(np.median(radii)) if len(rows) else None,
        curve=curve,
        smoothed_broken=int((~rows["smoothed_stands"]).sum()),
        network_broken=int((right & ~rows["network_stands"]).sum()),
        autoattack_broken=int((at_threat & attacked & ~stands).sum()) if attacked.any() else None,
    )


def certified_curve(found: Certified, epsilon: float, path: Path) -> None:
    """Draw certified accuracy along the radius, in the norm of the threat model, beside clean accuracy and AutoAttack's.

    `epsilon` is the radius of the threat model. What lies between is unknown: the certificate is a lower bound for the
    smoothed classifier, AutoAttack's accuracy an upper bound for the network.
    """
    axes: Any = fg.new_figure(5.6, 3.8).subplots()
    x = np.array(found.curve.x) / found.scale
    points = found.curve.accuracy
    low, high = [point.low for point in points], [point.high for point in points]
    axes.fill_between(x, low, high, color=fg.GREEN, alpha=0.18, linewidth=0)
    estimates = [math.nan if point.estimate is None else point.estimate for point in points]
    # After the largest certified radius nothing is certified.
    axes.plot([*x, x[-1], epsilon], [*estimates, 0, 0], color=fg.GREEN, linewidth=1.8, label="certified (smoothed)")
    for share, place, label, colour, marker in (
        (found.clean, 0.0, "clean", fg.BLUE, "s"),
        (found.autoattack, epsilon, "AutoAttack", fg.ORANGE, "o"),
    ):
        if share is None or share.estimate is None:
            continue
        around = [[share.estimate - share.low], [share.high - share.estimate]]
        style = {"color": colour, "marker": marker, "linestyle": "none", "capsize": 3, "clip_on": False, "zorder": 4}
        axes.errorbar([place], [share.estimate], yerr=around, label=label, **style)
    axes.axvline(epsilon, color=fg.PURPLE, linewidth=1, linestyle=(0, (1, 2)), zorder=0, label=f"ε = {epsilon:.4g}")
    norm = "L2" if found.norm == "l2" else "L-infinity"
    axes.set(xlim=(0, 1.04 * max(epsilon, x[-1])), ylim=(-0.02, 1.02))
    axes.set(xlabel=f"radius in {norm}", ylabel="accuracy [%], 95% intervals")
    axes.yaxis.set_major_formatter(fg.percent())
    fg.plain(axes)
    fg.legend(axes)
    fg.save(axes.figure, path)
