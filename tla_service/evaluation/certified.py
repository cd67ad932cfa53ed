"""Certified accuracy by randomised smoothing: what the certificates of single images say together, and its picture."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tla_service.evaluation import figures as fg
from tla_service.evaluation.results import Curve, Share, share_of

ABSTAINED = -1
# One row per image: its number in the test set, true class, what the smoothed classifier predicts (`ABSTAINED`:
# nothing), and the radii, in L2 and in L-infinity, within which that is certified (0 then). `clean`: the network itself
# is right; `network_stands`: still right under an attack within the L2 radius; `smoothed_stands`: the smoothed
# prediction survives such an attack.
ROW = np.dtype(
    [
        ("index", np.int64),
        ("label", np.int64),
        ("predicted", np.int64),
        ("l2", np.float64),
        ("linf", np.float64),
        ("clean", np.bool_),
        ("network_stands", np.bool_),
        ("smoothed_stands", np.bool_),
    ]
)
Certificates = npt.NDArray[np.void]  # of ROW
_POINTS = 40


@dataclass(frozen=True)
class Certified:
    """Certificates of the smoothed classifier: the network's majority vote under Gaussian noise of deviation `sigma`.

    Each holds with probability 1 - `alpha`, from `samples` noisy copies. Radii are in the norm of the threat model: L2
    as certified; for L-infinity that is divided by the square root of the number of pixel values, because no
    L-infinity perturbation of that size is longer. `accuracy` counts images that are classified correctly with a
    certificate of any radius, `at_threat` those certified up to the report's radius. `clean` and `autoattack` are of
    the network itself, on the same images; AutoAttack maybe on part of them.

    An attack within its L2 radius changed the smoothed prediction of `smoothed_broken` certified images: the
    certificates say that there are none. The other two contradict no certificate, which are not of the network itself,
    and count images that it classifies correctly without an attack: `network_broken` correctly certified ones on which
    an attack within their L2 radius breaks the network, and `autoattack_broken` ones certified up to the report's
    radius that AutoAttack breaks.
    """

    images: int
    sigma: float
    samples: int
    alpha: float
    accuracy: Share
    abstained: Share
    at_threat: Share
    clean: Share
    autoattack: Share | None
    median_radius: float | None
    median_l2: float | None
    curve: Curve
    smoothed_broken: int
    network_broken: int
    autoattack_broken: int | None


def summarise(
    rows: Certificates,
    *,
    norm: Literal["linf", "l2"],
    epsilon: float,
    sigma: float,
    samples: int,
    alpha: float,
    standing: Mapping[int, bool] | None,
) -> Certified:
    """Summarise certificates of single images.

    `norm` and `epsilon` are the report's threat model; `standing` tells of images, by their numbers, whether they stand
    under AutoAttack, and is None if that was not run.
    """
    right, clean = rows["predicted"] == rows["label"], rows["clean"]
    radii = np.where(right, rows[norm], 0.0)
    at_threat = right & (radii >= epsilon)
    x = np.linspace(0, radii.max(initial=0.0), _POINTS if radii.any() else 1).tolist()
    curve = Curve("randomised smoothing", "epsilon", tuple(x), tuple(share_of(right & (radii >= at)) for at in x))
    attacked = np.array([int(index) in (standing or {}) for index in rows["index"]], dtype=bool)
    stands = np.array([(standing or {}).get(int(index), False) for index in rows["index"]], dtype=bool)
    return Certified(
        images=len(rows),
        sigma=sigma,
        samples=samples,
        alpha=alpha,
        accuracy=share_of(right),
        abstained=share_of(rows["predicted"] == ABSTAINED),
        at_threat=share_of(at_threat),
        clean=share_of(clean),
        autoattack=share_of(stands[attacked]) if attacked.any() else None,
        median_radius=float(np.median(radii)) if len(rows) else None,
        median_l2=float(np.median(np.where(right, rows["l2"], 0.0))) if len(rows) else None,
        curve=curve,
        smoothed_broken=int((~rows["smoothed_stands"]).sum()),
        network_broken=int((right & clean & ~rows["network_stands"]).sum()),
        autoattack_broken=int((at_threat & clean & attacked & ~stands).sum()) if attacked.any() else None,
    )


def certified_curve(found: Certified, norm: Literal["linf", "l2"], epsilon: float, path: Path) -> None:
    """Draw certified accuracy along the radius, beside clean accuracy and AutoAttack's.

    `norm` and `epsilon` are the threat model. What lies between is unknown: certificates are a lower bound for the
    smoothed classifier, AutoAttack's accuracy is an upper bound for the network.
    """
    axes: Any = fg.new_figure(5.6, 3.8).subplots()
    x, points = found.curve.x, found.curve.accuracy
    low, high = [point.low for point in points], [point.high for point in points]
    axes.fill_between(x, low, high, color=fg.GREEN, alpha=0.18, linewidth=0)
    estimates = [math.nan if point.estimate is None else point.estimate for point in points]
    beyond = max(x[-1], epsilon)  # nothing is certified beyond the largest radius
    axes.plot([*x, x[-1], beyond], [*estimates, 0, 0], color=fg.GREEN, linewidth=1.8, label="certified (smoothed)")
    for share, place, label, style in (
        (found.clean, 0.0, "clean", {"color": fg.BLUE, "marker": "s"}),
        (found.autoattack, epsilon, "AutoAttack", {"color": fg.ORANGE, "marker": "o"}),
    ):
        if share is not None and share.estimate is not None:
            around = [[share.estimate - share.low], [share.high - share.estimate]]
            fixed: dict[str, Any] = {"linestyle": "none", "capsize": 3, "clip_on": False, "zorder": 4}
            axes.errorbar([place], [share.estimate], yerr=around, label=label, **fixed, **style)
    axes.axvline(epsilon, color=fg.PURPLE, linewidth=1, linestyle=(0, (1, 2)), zorder=0, label=f"ε = {epsilon:.4g}")
    axes.set(xlim=(0, 1.04 * beyond), ylim=(-0.02, 1.02), ylabel="accuracy [%], 95% intervals")
    axes.set_xlabel(f"radius in {'L2' if norm == 'l2' else 'L-infinity'}")
    axes.yaxis.set_major_formatter(fg.PERCENT)
    fg.finish(axes, path)
