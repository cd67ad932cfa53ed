"""What an evaluation runs: the attacks, the radii, and which images."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple
from zlib import crc32

import torch
from torch import nn

from tla_service.attacks import Attack
from tla_service.attacks.minimum_norm import SparseNorm
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
from tla_service.data import Dataset
from tla_service.data.splits import stratified_subset
from tla_service.errors import ConfigError
from tla_service.evaluation.adaptive import AdaptiveMeasurement, Aim
from tla_service.evaluation.audit import AuditMeasurement
from tla_service.evaluation.beyond import CorruptionMeasurement
from tla_service.evaluation.embedding import EmbeddingMeasurement
from tla_service.evaluation.paper import epsilon_sweep, paper_columns, step_sweep
from tla_service.evaluation.shards import IntArray, Measurement
from tla_service.evaluation.smoothing import CertificationMeasurement
from tla_service.evaluation.suite import AttackMeasurement, NormMeasurement, evaluation_attack
from tla_service.evaluation.surrogate import SurrogateMeasurement, surrogate_rows
from tla_service.evaluation.unit_tests import UnitTestMeasurement
from tla_service.inference.detector import Detector
from tla_service.report.relatives import Kin
from tla_service.report.settings import ReportSettings
from tla_service.report.tasks import Task
from tla_service.runtime import mixed_seed

_EPSILON_FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
_DETECTION_FACTOR = 1.5
TRANSFER = "transfer-"  # in names of tasks
_OTHER_RESTARTS = 5
_SPARSE: tuple[SparseNorm, ...] = ("l0", "l1")


class _Level(NamedTuple):
    epsilon: float
    steps: int


# Radii and steps at which the paper attacks test images for detection, in L-infinity (caption of Fig. 5).
_DETECTION = {"mnist": _Level(0.3, 100), "cifar10": _Level(25 / 255, 20), "tiny_imagenet": _Level(25 / 255, 30)}
# The radius of Tables 2 and 3 that is not among the others.
_SHIFT = {"mnist": _Level(0.03, 40)}


@dataclass(frozen=True)
class Plan:
    """The attacks of an evaluation.

    `columns` are white-box attacks by name, those in `within` under the threat model itself; `transfer` attacks are
    crafted on the surrogate. `iterative` is the strongest PGD under the threat model. `shift` has the attacks of the
    shift ratios by radius, rising.
    """

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
        """The attack with the most restarts, or None where none has any."""
        name = max(self.columns, key=lambda name: self.columns[name].num_restarts)
        return name if self.columns[name].num_restarts > 1 else None


def make_plan(settings: ReportSettings, data_name: str, norm: Norm, epsilon: float, *, has_surrogate: bool) -> Plan:
    """Decide on the attacks, from the settings and what the model was trained for.

    Without a surrogate transfer attacks are left out. ConfigError if a norm has no radius, or none of the attacks is
    PGD under the threat model.
    """
    norm, epsilon = _threat_model(settings, data_name, norm, epsilon)
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
    return Plan(
        norm=norm,
        epsilon=epsilon,
        columns=white,
        within=tuple(within),
        transfer=black if has_surrogate else {},
        is_paper=not settings.attacks and norm == "linf" and epsilon == documented_radius(data_name, norm),
        iterative=max(iterative, key=lambda name: iterative[name].num_steps),
        detection=detection,
        shift=dict(sorted(shift.items())),
        seed=settings.seed,
        batch_size=settings.batch_size,
    )


def _threat_model(settings: ReportSettings, data_name: str, norm: Norm, epsilon: float) -> tuple[Norm, float]:
    """What was asked for, else what the model was trained for; its radius counts in its own norm only."""
    chosen = settings.norm or norm
    radius = epsilon if chosen == norm else documented_radius(data_name, chosen)
    if settings.epsilon is not None:
        radius = settings.epsilon
    if radius is None:
        raise ConfigError("norm", chosen, *no_radius(data_name, chosen, "--epsilon"))
    return chosen, radius


def check_plan(plan: Plan, shape: ImageShape) -> None:
    """Raise ConfigError for radii and step sizes that make no sense on images of a shape (C, H, W)."""
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
    return "larger" if plan.detection.epsilon == plan.epsilon else radius_name(plan.detection.epsilon)


def smoothing_sigma(plan: Plan, settings: ReportSettings) -> float:
    """Deviation of the noise that certificates are for.

    In L-infinity it is on average as long as the longest perturbation of the threat model; in L2 a certificate up to
    the radius takes 98 % of the votes.
    """
    return settings.certificate.sigma or (plan.epsilon if plan.norm == "linf" else plan.epsilon / 2)


def other_norm_attack(plan: Plan, data_name: str, shape: ImageShape) -> Attack:
    """PGD in L2 for a threat model in L-infinity, and the other way round, at the radius customary for the data."""
    norm: Norm = "l2" if plan.norm == "linf" else "linf"
    attack = _pgd(norm, customary_radius(data_name, norm, shape)[0], plan.strongest.num_steps)
    return replace(attack, num_restarts=_OTHER_RESTARTS)


def attack_tasks(
    plan: Plan, settings: ReportSettings, dataset: Dataset, model: str, *, is_own: bool = True
) -> list[Task]:
    """The table of attacks and AutoAttack, for the model and those it is compared with, which are not its own."""
    table = AttackMeasurement(plan.columns, plan.transfer, None, plan.seed, plan.batch_size)
    tasks = [_task("columns", model, dataset, settings.images.attacks, plan, table)]
    if settings.images.autoattack:
        keep = settings.images.adversarial and is_own
        strong = AttackMeasurement({}, {}, (plan.norm, plan.epsilon), plan.seed, plan.batch_size, keep_images=keep)
        tasks.append(_task("autoattack", model, dataset, settings.images.autoattack, plan, strong))
    return tasks


def embedding_tasks(plan: Plan, settings: ReportSettings, dataset: Dataset, model: str, bank: IntArray) -> list[Task]:
    """Embeddings of test images, natural and attacked, and of the training images in `bank`."""
    count = settings.images.representation
    if not count:
        return []
    attacks: dict[str, Attack | None] = {"natural": None}
    attacks |= {radius_name(epsilon): attack for epsilon, attack in plan.shift.items()}
    attacks |= {radius_name(plan.epsilon): plan.strongest}
    attacks |= {detection_name(plan): plan.detection}
    tasks = [
        _task(name, model, dataset, count, plan, EmbeddingMeasurement(attack, plan.seed, plan.batch_size))
        for name, attack in attacks.items()
    ]
    natural = EmbeddingMeasurement(None, plan.seed, plan.batch_size)
    return [*tasks, Task("bank", model, "train", bank, plan.batch_size, natural)]


def validation_task(plan: Plan, settings: ReportSettings, dataset: Dataset, model: str, rows: torch.Tensor) -> Task:
    """Embeddings of validation images, rows (n,) of their source, for the threshold of the detector fitted here."""
    source = dataset.train if dataset.validation is None else dataset.validation
    natural = EmbeddingMeasurement(None, plan.seed, plan.batch_size)
    chosen = bank_rows(rows, source.labels, settings.images.bank)
    return Task("validation", model, "validation", chosen, plan.batch_size, natural)


def adaptive_name(aim: Aim, detector: Detector) -> str:
    """Name of the task that attacks a detector: another detector is another task."""
    tables = detector.to_arrays()
    return f"{aim}-{crc32(b''.join(tables[name].tobytes() for name in sorted(tables))):08x}"


def adaptive_tasks(
    plan: Plan, settings: ReportSettings, dataset: Dataset, model: str, detectors: Sequence[Detector]
) -> list[Task]:
    """The attacks on classifier and detector together, for the model alone."""
    count = min(settings.images.adaptive, settings.images.representation)
    aims: tuple[Aim, ...] = ("evasion", "rejection")
    return [
        _task(
            adaptive_name(aim, detector),
            model,
            dataset,
            count,
            plan,
            AdaptiveMeasurement(detector, aim, plan.strongest, plan.seed, plan.batch_size),
        )
        for detector in detectors
        for aim in aims
    ]


def single_tasks(plan: Plan, settings: ReportSettings, dataset: Dataset, model: str) -> list[Task]:
    """Curves, other norms, corruptions and certificates, for the model alone."""
    counts, attack = settings.images, plan.strongest
    radii = tuple(plan.epsilon * factor for factor in _EPSILON_FACTORS)
    radii = tuple(radius for radius in radii if plan.norm == "l2" or radius <= 1)
    single = replace(attack, kind="fgsm", num_steps=1, step_size=attack.epsilon)
    sweeps = {
        "epsilon-iterative": epsilon_sweep(attack, radii),
        "epsilon-single": epsilon_sweep(single, radii),
        "steps": step_sweep(attack, attack.num_steps),
    }
    measures: list[tuple[str, int, Measurement]] = [
        (name, counts.curves, AttackMeasurement(attacks, {}, None, plan.seed, plan.batch_size))
        for name, attacks in sweeps.items()
    ]
    measures += [(norm, counts.sparse, NormMeasurement(norm, plan.batch_size)) for norm in _SPARSE]
    other = other_norm_attack(plan, dataset.name, dataset.image_shape)
    measures += [
        ("other-norm", counts.sparse, AttackMeasurement({"pgd": other}, {}, None, plan.seed, plan.batch_size)),
        ("corruptions", counts.corruptions, CorruptionMeasurement(plan.seed, plan.batch_size)),
    ]
    chosen, sigma = settings.certificate, smoothing_sigma(plan, settings)
    certificates = CertificationMeasurement(sigma, chosen.samples, chosen.alpha, plan.seed, plan.batch_size)
    # Not last: its only shard takes long, and other workers would wait for it.
    measures.insert(0, ("certified", counts.certified, certificates))
    return [_task(name, model, dataset, count, plan, measure) for name, count, measure in measures if count]


def surrogate_task(plan: Plan, dataset: Dataset, model: str, *, natural: bool = False) -> Task:
    """Training of a surrogate for the audit, or of a natural one for the attacks through relatives."""
    rows = surrogate_rows(dataset.train.labels, dataset.image_shape).numpy()
    name = "natural-surrogate" if natural else "surrogate"
    seed = mixed_seed(plan.seed, crc32(name.encode()))
    measure = SurrogateMeasurement(plan.norm, plan.epsilon, len(dataset.class_names), seed, natural=natural)
    return Task(name, model, "train", rows, len(rows), measure)


def transfer_task(plan: Plan, settings: ReportSettings, dataset: Dataset, model: str, kin: Kin) -> Task:
    """The attack crafted on a relative, whose name carries its weights."""
    attack = AttackMeasurement({}, {kin.source: plan.strongest}, None, plan.seed, plan.batch_size)
    task = _task(f"{TRANSFER}{kin.source}-{kin.weights}", model, dataset, settings.images.transfer, plan, attack)
    return replace(task, surrogate=kin.network)


def audit_tasks(
    plan: Plan, settings: ReportSettings, dataset: Dataset, model: str, surrogate: nn.Module | str
) -> list[Task]:
    """The audit, for the model alone, with its surrogate, or why there is none."""
    if not settings.images.audit:
        return []
    rows = _rows(dataset, settings.images.audit)
    network, why = (None, surrogate) if isinstance(surrogate, str) else (surrogate, "")
    audit = AuditMeasurement(plan.strongest, plan.seed, plan.batch_size, why)
    tasks = [Task("audit", model, "test", rows, len(rows), audit, network)]
    if settings.images.unit_tests:
        within = {name: plan.columns[name] for name in plan.within}
        strong = settings.images.autoattack > 0
        tests = UnitTestMeasurement(within, plan.norm, plan.epsilon, strong, plan.seed, plan.batch_size)
        tasks.append(_task("unit-tests", model, dataset, settings.images.unit_tests, plan, tests))
    return tasks


def protocol(plan: Plan, settings: ReportSettings) -> str:
    """Eight hex digits of everything that shapes the figures, but weights and data."""
    parts = {
        name: getattr(settings, name).model_dump()
        for name in ("images", "detection", "certificate", "neighbours", "pictures")
    }
    described = asdict(plan, dict_factory=lambda items: {key: value for key, value in items if key != "function"})
    text = json.dumps(parts | {"plan": described}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def query_task(plan: Plan, model: str, rows: IntArray) -> Task:
    """Embeddings and pixels of a few attacked test images, for the pictures."""
    measure = EmbeddingMeasurement(plan.strongest, plan.seed, len(rows), keep_images=True)
    return Task("examples", model, "test", rows, len(rows), measure)


def _task(name: str, model: str, dataset: Dataset, count: int | None, plan: Plan, measurement: Measurement) -> Task:
    return Task(name, model, "test", _rows(dataset, count), plan.batch_size, measurement)


def _rows(dataset: Dataset, count: int | None) -> IntArray:
    labels = dataset.test.labels
    return stratified_subset(labels, len(labels) if count is None else count).numpy()


def bank_rows(training_rows: torch.Tensor, labels: torch.Tensor, count: int) -> IntArray:
    """Training images to fit to, `count` at most, stratified: of the training split (n,), none it was validated on."""
    chosen: IntArray = training_rows[stratified_subset(labels[training_rows], count)].numpy()
    return chosen
