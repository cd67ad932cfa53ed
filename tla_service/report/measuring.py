"""What an evaluation measures: the tasks, in their order, and those that follow from results."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from tla_service.data import split_training
from tla_service.errors import ConfigError, UserError
from tla_service.evaluation.geometry import pick_queries
from tla_service.evaluation.results import Relative
from tla_service.evaluation.surrogate import ARCHITECTURE, TrainedSurrogate
from tla_service.models import build_model
from tla_service.report import task_list as tl
from tla_service.report.findings import fitted_detector
from tla_service.report.loading import Models
from tla_service.report.page import describe_surrogate
from tla_service.report.plan import Plan
from tla_service.report.relatives import Kin
from tla_service.report.tasks import Inputs, Measurer, Results, Task, run_tasks
from tla_service.training.reporting import Terminal


@dataclass(frozen=True)
class Measuring:
    """The measurements of an evaluation."""

    plan: Plan
    models: Models
    output: Path
    terminal: Terminal
    relatives: list[Relative] = field(default_factory=list)  # those tried so far

    def tasks(self) -> list[Task]:
        """What is measured of every test image; ConfigError if so few are taken that all of them are set aside."""
        plan, models, counts = self.plan, self.models, self.plan.settings.images
        subject, dataset = models.subject, models.dataset
        labels, config = dataset.train.labels, subject.config
        rows, held_out = torch.arange(len(labels)), None
        if config is not None and config.data.name == dataset.name:
            # Gaussians are fitted to training images; the validation split of the training run stays out.
            rows, (_, held_out) = split_training(dataset, config.data.validation_fraction, config.seed)
        bank = tl.bank_rows(rows, labels, counts.bank)
        tasks = []
        for each in models.all:
            tasks += tl.attack_tasks(plan, dataset, each.key, is_own=each is subject)
            tasks += tl.embedding_tasks(plan, dataset, each.key, bank)
        if models.surrogate is not None:
            tasks = [replace(task, surrogate=models.surrogate.network) for task in tasks]
        tasks += tl.single_tasks(plan, dataset, subject.key)
        if held_out is not None and counts.adaptive and counts.representation:
            tasks.append(tl.validation_task(plan, dataset, subject.key, held_out))
        for task in tasks:
            if task.split == "test" and dataset.gate[task.rows].all():
                reason = (
                    f"{task.name} takes {len(task.rows)} test images, all of which are set aside for the promotion gate"
                )
                raise ConfigError("images", None, reason, "take more images (images.*, data.test_limit)")
            if task.key == (subject.key, "autoattack") and dataset.gate.any() and not dataset.gate[task.rows].any():
                self.terminal.say(
                    f"none of AutoAttack's {len(task.rows)} images is set aside for the gate, which a class's first "
                    f"image never is; to promote the model, take {4 * len(dataset.class_names)} (images.autoattack)"
                )
        return tasks

    def measure(self, tasks: Sequence[Task], workers: Callable[[], Measurer]) -> tuple[Results, list[Task], str]:
        """Run all tasks, and those that depend on their results; also returns what was run, and on what hardware."""
        plan, models, counts = self.plan, self.models, self.plan.settings.images
        key, dataset = models.subject.key, models.dataset
        inputs = Inputs({each.key: each.network for each in models.all}, dataset)
        without = self._no_surrogate()
        # First what others follow from.
        embedded = ((key, "bank"), (key, "natural"))
        early = [task for task in tasks if task.key in embedded]
        if counts.audit and models.surrogate is None and not without:
            self.terminal.say("no --surrogate is given: training a small one for the audit's transfer check")
            early.insert(0, tl.surrogate_task(plan, dataset, key))
        if counts.transfer and not without:
            early.insert(0, tl.surrogate_task(plan, dataset, key, natural=True))
        # Then the longest shards: at the end workers wait for a short one only.
        rest = sorted((task for task in tasks if task.key not in embedded), key=lambda task: task.name != "autoattack")
        measure = workers()
        self.terminal.say(f"measuring on {measure}")
        then = partial(self._following, without=without)
        results, run = run_tasks(rest, inputs, self.output, measure, self.terminal, early, then)
        return results, run, str(measure)

    def _no_surrogate(self) -> str:
        """Why no surrogate can be trained on such images; empty if one can."""
        try:
            build_model(ARCHITECTURE, len(self.models.dataset.class_names), self.models.dataset.image_shape)
        except UserError as error:
            return str(error)
        return ""

    def _following(self, found: Results, without: str) -> list[Task]:
        """What is measured once the first results are known; `without` is why there is no surrogate."""
        plan, models, counts = self.plan, self.models, self.plan.settings.images
        dataset, key, rejector = models.dataset, models.subject.key, models.subject.rejector
        tasks: list[Task] = []
        if counts.audit:
            surrogate: nn.Module | str
            if models.surrogate is not None:
                surrogate = models.surrogate.network
            elif without:
                self.terminal.say(surrogate := f"no surrogate was given, and none could be trained ({without})")
            else:
                self.terminal.say(describe_surrogate(found[key, "surrogate"].facts))
                surrogate = self._built(found[key, "surrogate"])
            tasks += tl.audit_tasks(plan, dataset, key, surrogate)
        if (key, "bank") in found and counts.adaptive:
            with contextlib.suppress(ConfigError):  # no detector to attack: the report says why
                own = fitted_detector(found[key, "bank"], plan)
                detectors = [own] if rejector is None else [own, rejector.detector]
                tasks += tl.adaptive_tasks(plan, dataset, key, detectors)
        if (key, "natural") in found and plan.settings.page:
            shown = found[key, "natural"]
            shown = shown.only(~dataset.gate.numpy()[shown.rows])
            rows = shown.rows[pick_queries(shown.embedded, plan.settings.pictures.queries, plan.seed)]
            tasks += [tl.query_task(plan, key, rows)] if len(rows) else []
        if counts.transfer:
            natural = Kin("natural", "a naturally trained surrogate", why=without)
            if not without:
                trained = found[key, "natural-surrogate"]
                natural = Kin("natural", describe_surrogate(trained.facts, natural=True), self._built(trained))
            for kin in (*models.relatives, natural):
                self.relatives.append(Relative(kin.source, kin.about, why=kin.why))
                tasks += [tl.transfer_task(plan, dataset, key, kin)] if kin.network is not None else []
        return tasks

    def _built(self, trained: TrainedSurrogate) -> nn.Module:
        dataset = self.models.dataset
        network = build_model(trained.facts.architecture, len(dataset.class_names), dataset.image_shape)
        network.load_state_dict(trained.weights)
        return network.eval()
