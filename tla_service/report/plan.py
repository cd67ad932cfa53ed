"""What an evaluation runs: the attacks, the radii, and which images."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from tla_service.attacks import Attack
from tla_service.config.adversary import AttackConfig, EvaluationAttack
from tla_service.config.radii import (
    ImageShape,
    Norm,
    customary_radius,
    documented_radius,
    known_shape,
    length_trouble,
    no_radius,
)
from tla_service.errors import ConfigError
from tla_service.evaluation.adaptive import Aim
from tla_service.evaluation.paper import paper_columns
from tla_service.evaluation.suite import evaluation_attack
from tla_service.inference.detector import Detector, digest_of
from tla_service.report.settings import ReportSettings

_DETECTION_FACTOR = 1.5
TRANSFER = "transfer-"  # in names of tasks
_OTHER_RESTARTS = 5


class _Level(NamedTuple):
    epsilon: float
    steps: int


# Radii and steps at which the paper attacks test images for detection, in L-infinity (caption of Fig. 5).
_DETECTION = {"mnist": _Level(0.3, 100), "cifar10": _Level(25 / 255, 20), "tiny_imagenet": _Level(25 / 255, 30)}
# The radius of Tables 2 and 3 that is not among the others.
_SHIFT = {"mnist": _Level(0.03, 40)}


@dataclass(frozen=True)
class Plan:
    """The settings of an evaluation, and the attacks that follow from them.

    `columns` are white-box attacks by name, those in `within` under the threat model itself; `transfer` attacks are
    crafted on the surrogate. `iterative` is the strongest PGD under the threat model. `shift` has the attacks of the
    shift ratios by radius, rising.
    """

    settings: ReportSettings
    norm: Norm
    epsilon: float
    columns: dict[str, Attack]
    within: tuple[str, ...]
    transfer: dict[str, Attack]
    is_paper: bool
    iterative: str
    detection: Attack
    shift: dict[float, Attack]
    seed: int
    batch_size: int

    @property
    def strongest(self) -> Attack:
        """The attack that curves, audit, neighbours and pictures use."""
        return replace(self.columns[self.iterative], num_restarts=1)

    @property
    def restarted(self) -> str | None:
        """The PGD under the threat model with the most restarts, or None where none has any."""
        pgd = [name for name in self.within if self.columns[name].kind == "pgd"]
        name = max(pgd, key=lambda name: self.columns[name].num_restarts)
        return name if self.columns[name].num_restarts > 1 else None


def make_plan(settings: ReportSettings, data_name: str, norm: Norm, epsilon: float, *, has_surrogate: bool) -> Plan:
    """Decide on the attacks, from the settings and what the model was trained for.

    Without a surrogate transfer attacks are left out. ConfigError if a norm has no radius, or none of the attacks is
    PGD under the threat model.
    """
    chosen = settings.norm or norm
    # The radius that the model was trained for counts in its own norm only.
    radius = settings.epsilon or (epsilon if chosen == norm else documented_radius(data_name, chosen))
    if radius is None:
        raise ConfigError("norm", chosen, *no_radius(data_name, chosen, "--epsilon"))
    norm, epsilon = chosen, radius
    detection = _detection_attack(settings, data_name, norm, epsilon)
    training = AttackConfig(norm=norm, epsilon=epsilon, step_size=epsilon / 10)
    small = _SHIFT.get(data_name) if norm == "linf" else None
    shift = {detection.epsilon: detection} | ({small.epsilon: _pgd(norm, *small)} if small else {})
    columns = paper_columns(data_name, norm, epsilon)

    def attacks(entries: Mapping[str, EvaluationAttack]) -> dict[str, Attack]:
        return {n: evaluation_attack(entry, training, data_name, f"attacks.{n}") for n, entry in entries.items()}

    white = attacks(settings.attacks or columns.attacks)
    black = {} if settings.attacks else attacks(columns.transfer)
    within = {name: attack for name, attack in white.items() if (attack.norm, attack.epsilon) == (norm, epsilon)}
    iterative = {name: attack for name, attack in within.items() if attack.kind == "pgd"}
    if not iterative:
        reason = f"none of them is PGD with norm {norm} and epsilon {epsilon:g}, which curves and audit need"
        remedy = 'add one, such as --attacks \'{"pgd50": {"num_steps": 50}}\''
        raise ConfigError("attacks", ", ".join(white), reason, remedy)
    protocol = {name: getattr(settings, name) for name in ("attacks", "detection", "neighbours")}
    is_default = protocol == {name: ReportSettings.model_fields[name].default for name in protocol}
    return Plan(
        settings=settings,
        norm=norm,
        epsilon=epsilon,
        columns=white,
        within=tuple(within),
        transfer=black if has_surrogate else {},
        is_paper=is_default and norm == "linf" and epsilon == documented_radius(data_name, norm),
        iterative=max(iterative, key=lambda name: iterative[name].num_steps),
        detection=detection,
        shift=dict(sorted(shift.items())),
        seed=settings.seed,
        batch_size=settings.batch_size,
    )


def check_plan(plan: Plan, shape: ImageShape, classes: int) -> None:
    """Raise ConfigError for lengths that make no sense on images (C, H, W), and pictures of classes beyond theirs."""
    pictures = plan.settings.pictures
    for field, value, chosen in (
        ("tsne_class", pictures.tsne_class, (pictures.tsne_class or 0,)),
        ("tsne_pair", pictures.tsne_pair, pictures.tsne_pair or ()),
    ):
        if not all(0 <= klass < classes for klass in chosen):
            reason = f"there are classes 0 to {classes - 1}"
            raise ConfigError(f"pictures.{field}", value, reason, "choose among them")
    named = {f"attacks.{name}": attack for name, attack in plan.columns.items()} | {"detection": plan.detection}
    found = [length_trouble("", plan.norm, plan.epsilon, shape=shape)]
    for where, attack in named.items():
        step_size = None if attack.kind == "fgsm" else attack.step_size
        found.append(length_trouble(where, attack.norm, attack.epsilon, step_size, attack.num_steps, shape))
    trouble = next(filter(None, found), None)
    if trouble is not None:
        raise trouble


def _pgd(norm: Norm, epsilon: float, steps: int, step_size: float | None = None) -> Attack:
    return Attack(kind="pgd", norm=norm, epsilon=epsilon, step_size=step_size or 2.5 * epsilon / steps, num_steps=steps)


def _detection_attack(settings: ReportSettings, data_name: str, norm: Norm, epsilon: float) -> Attack:
    paper = _DETECTION.get(data_name) if norm == "linf" else None
    chosen = settings.detection
    shape = known_shape(data_name, None)
    largest = 1.0 if norm == "linf" else math.inf if shape is None else math.sqrt(math.prod(shape))
    larger = min(_DETECTION_FACTOR * epsilon, largest)
    radius = chosen.epsilon or (paper.epsilon if paper else larger)
    return _pgd(norm, radius, chosen.num_steps or (paper.steps if paper else 50), chosen.step_size)


def radius_name(epsilon: float) -> str:
    """Name of the task that embeds images attacked at a radius."""
    return f"attacked-{epsilon:.6g}"


def detection_name(plan: Plan) -> str:
    """Name of the task that embeds the attacked images of the detection test."""
    name = radius_name(plan.detection.epsilon)
    return "larger" if name == radius_name(plan.epsilon) else name


def smoothing_sigma(plan: Plan) -> float:
    """Deviation of the noise that certificates are for.

    In L-infinity it is on average as long as the longest perturbation of the threat model; in L2 a certificate up to
    the radius takes 98 % of the votes.
    """
    return plan.settings.certificate.sigma or (plan.epsilon if plan.norm == "linf" else plan.epsilon / 2)


def other_norm_attack(plan: Plan, data_name: str, shape: ImageShape) -> Attack:
    """PGD in L2 for a threat model in L-infinity, and the other way round, at the radius customary for the data."""
    norm: Norm = "l2" if plan.norm == "linf" else "linf"
    attack = _pgd(norm, customary_radius(data_name, norm, shape)[0], plan.strongest.num_steps)
    return replace(attack, num_restarts=_OTHER_RESTARTS)


def adaptive_name(aim: Aim, detector: Detector) -> str:
    """Name of the task that attacks a detector: another detector is another task."""
    return f"{aim}-{digest_of(detector.to_arrays())}"


def protocol(plan: Plan) -> str:
    """Eight hex digits of everything that shapes the figures, but weights and data."""
    parts = plan.settings.model_dump(include={"images", "detection", "certificate", "neighbours", "pictures"})
    left_out = {"settings", "function"}  # the latter of attacks, whose name is their kind
    described = asdict(plan, dict_factory=lambda items: {key: value for key, value in items if key not in left_out})
    text = json.dumps(parts | {"plan": described}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
