"""The tasks of an evaluation: what is measured, on which images."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from zlib import crc32

import torch
from torch import nn

from tla_service.attacks import Attack
from tla_service.data import Dataset
from tla_service.data.splits import stratified_subset
from tla_service.evaluation.adaptive import AIMS, AdaptiveMeasurement
from tla_service.evaluation.audit import AuditMeasurement
from tla_service.evaluation.beyond import CorruptionMeasurement
from tla_service.evaluation.embedding import EmbeddingMeasurement
from tla_service.evaluation.paper import epsilon_sweep, step_sweep
from tla_service.evaluation.shards import IntArray, Measurement
from tla_service.evaluation.smoothing import CertificationMeasurement
from tla_service.evaluation.suite import SPARSE_NORMS, AttackMeasurement, NormMeasurement
from tla_service.evaluation.surrogate import SurrogateMeasurement, surrogate_rows
from tla_service.evaluation.unit_tests import UnitTestMeasurement
from tla_service.inference.detector import Detector
from tla_service.report import plan as pl
from tla_service.report.relatives import Kin
from tla_service.report.tasks import Task
from tla_service.runtime import mixed_seed

_EPSILON_FACTORS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


def attack_tasks(plan: pl.Plan, dataset: Dataset, model: str, *, is_own: bool = True) -> list[Task]:
    """The table of attacks and AutoAttack, for the model and those it is compared with, which are not its own."""
    counts = plan.settings.images
    table = AttackMeasurement(plan.columns, plan.transfer, None, plan.seed, plan.batch_size)
    tasks = [_task("columns", model, dataset, counts.attacks, plan, table)]
    if counts.autoattack:
        keep = counts.adversarial and is_own
        strong = AttackMeasurement({}, {}, (plan.norm, plan.epsilon), plan.seed, plan.batch_size, keep_images=keep)
        tasks.append(_task("autoattack", model, dataset, counts.autoattack, plan, strong))
    return tasks


def embedding_tasks(plan: pl.Plan, dataset: Dataset, model: str, bank: IntArray) -> list[Task]:
    """Embeddings of test images, natural and attacked, and of the training images in `bank`."""
    count = plan.settings.images.representation
    if not count:
        return []
    attacks: dict[str, Attack | None] = {"natural": None}
    attacks |= {pl.radius_name(epsilon): attack for epsilon, attack in plan.shift.items()}
    attacks |= {pl.radius_name(plan.epsilon): plan.strongest, pl.detection_name(plan): plan.detection}
    measures = {name: EmbeddingMeasurement(attack, plan.seed, plan.batch_size) for name, attack in attacks.items()}
    tasks = [_task(name, model, dataset, count, plan, measure) for name, measure in measures.items()]
    return [*tasks, Task("bank", model, "train", bank, plan.batch_size, measures["natural"])]


def validation_task(plan: pl.Plan, dataset: Dataset, model: str, rows: torch.Tensor) -> Task:
    """Embeddings of validation images, rows (n,) of their source, for the threshold of the detector fitted here."""
    source = dataset.train if dataset.validation is None else dataset.validation
    natural = EmbeddingMeasurement(None, plan.seed, plan.batch_size)
    chosen = bank_rows(rows, source.labels, plan.settings.images.bank)
    return Task("validation", model, "validation", chosen, plan.batch_size, natural)


def adaptive_tasks(plan: pl.Plan, dataset: Dataset, model: str, detectors: Sequence[Detector]) -> list[Task]:
    """The attacks on classifier and detector together, for the model alone."""
    count = min(plan.settings.images.adaptive, plan.settings.images.representation)
    tasks = []
    for detector, aim in product(detectors, AIMS):
        measure = AdaptiveMeasurement(detector, aim, plan.strongest, plan.seed, plan.batch_size)
        tasks.append(_task(pl.adaptive_name(aim, detector), model, dataset, count, plan, measure))
    return tasks


def single_tasks(plan: pl.Plan, dataset: Dataset, model: str) -> list[Task]:
    """Curves, other norms, corruptions and certificates, for the model alone."""
    counts, attack = plan.settings.images, plan.strongest
    radii = tuple(plan.epsilon * factor for factor in _EPSILON_FACTORS)
    radii = tuple(radius for radius in radii if plan.norm == "l2" or radius <= 1)
    single = replace(attack, kind="fgsm", num_steps=1, step_size=attack.epsilon)
    other = pl.other_norm_attack(plan, dataset.name, dataset.image_shape)

    def attacked(attacks: dict[str, Attack]) -> AttackMeasurement:
        return AttackMeasurement(attacks, {}, None, plan.seed, plan.batch_size)

    chosen, sigma = plan.settings.certificate, pl.smoothing_sigma(plan)
    certificates = CertificationMeasurement(sigma, chosen.samples, chosen.alpha, plan.seed, plan.batch_size)
    measures: list[tuple[str, int, Measurement]] = [
        # Not last: its only shard takes long, and other workers would wait for it.
        ("certified", counts.certified, certificates),
        ("epsilon-iterative", counts.curves, attacked(epsilon_sweep(attack, radii))),
        ("epsilon-single", counts.curves, attacked(epsilon_sweep(single, radii))),
        ("steps", counts.curves, attacked(step_sweep(attack, attack.num_steps))),
        *((norm, counts.sparse, NormMeasurement(norm, plan.batch_size)) for norm in SPARSE_NORMS),
        ("other-norm", counts.sparse, attacked({"pgd": other})),
        ("corruptions", counts.corruptions, CorruptionMeasurement(plan.seed, plan.batch_size)),
    ]
    return [_task(name, model, dataset, count, plan, measure) for name, count, measure in measures if count]


def surrogate_task(plan: pl.Plan, dataset: Dataset, model: str, *, natural: bool = False) -> Task:
    """Training of a surrogate for the audit, or of a natural one for the attacks through relatives."""
    rows = surrogate_rows(dataset.train.labels, dataset.image_shape).numpy()
    name = "natural-surrogate" if natural else "surrogate"
    seed = mixed_seed(plan.seed, crc32(name.encode()))
    measure = SurrogateMeasurement(plan.norm, plan.epsilon, len(dataset.class_names), seed, natural=natural)
    return Task(name, model, "train", rows, len(rows), measure)


def transfer_task(plan: pl.Plan, dataset: Dataset, model: str, kin: Kin) -> Task:
    """The attack crafted on a relative, whose name carries its weights."""
    attack = AttackMeasurement({}, {kin.source: plan.strongest}, None, plan.seed, plan.batch_size)
    name, count = f"{pl.TRANSFER}{kin.source}-{kin.weights}", plan.settings.images.transfer
    return replace(_task(name, model, dataset, count, plan, attack), surrogate=kin.network)


def audit_tasks(plan: pl.Plan, dataset: Dataset, model: str, surrogate: nn.Module | str) -> list[Task]:
    """The audit, for the model alone, with its surrogate, or why there is none."""
    counts = plan.settings.images
    rows = _rows(dataset, counts.audit)
    network, why = (None, surrogate) if isinstance(surrogate, str) else (surrogate, "")
    audit = AuditMeasurement(plan.strongest, plan.seed, plan.batch_size, why)
    tasks = [Task("audit", model, "test", rows, len(rows), audit, network)]
    if counts.unit_tests:
        within = {name: plan.columns[name] for name in plan.within}
        strong = counts.autoattack > 0
        tests = UnitTestMeasurement(within, plan.norm, plan.epsilon, strong, plan.seed, plan.batch_size)
        tasks.append(_task("unit-tests", model, dataset, counts.unit_tests, plan, tests))
    return tasks


def query_task(plan: pl.Plan, model: str, rows: IntArray) -> Task:
    """Embeddings and pixels of a few attacked test images, for the pictures."""
    measure = EmbeddingMeasurement(plan.strongest, plan.seed, len(rows), keep_images=True)
    return Task("examples", model, "test", rows, len(rows), measure)


def _task(name: str, model: str, dataset: Dataset, count: int | None, plan: pl.Plan, measurement: Measurement) -> Task:
    return Task(name, model, "test", _rows(dataset, count), plan.batch_size, measurement)


def _rows(dataset: Dataset, count: int | None) -> IntArray:
    labels = dataset.test.labels
    return stratified_subset(labels, len(labels) if count is None else count).numpy()


def bank_rows(training_rows: torch.Tensor, labels: torch.Tensor, count: int) -> IntArray:
    """Training images to fit to, `count` at most, stratified: of the training split (n,), none it was validated on."""
    chosen: IntArray = training_rows[stratified_subset(labels[training_rows], count)].numpy()
    return chosen
