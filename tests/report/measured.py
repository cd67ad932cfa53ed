"""What a small trained network is measured to do, and the report on it."""

from functools import cache, partial
from html.parser import HTMLParser
from typing import Any
from unittest.mock import patch

import torch

from tests.report.subjects import digits, settings, trained
from tla_service.evaluation import suite
from tla_service.evaluation.shards import Shard
from tla_service.report import findings as fd
from tla_service.report import schema as rp
from tla_service.report import tables as tb
from tla_service.report.plan import (
    Plan,
    make_plan,
)
from tla_service.report.task_list import (
    attack_tasks,
    bank_rows,
    embedding_tasks,
    single_tasks,
)
from tla_service.report.tasks import Task, select

CPU = torch.device("cpu")
MODEL = "0123456789ab"


def plan(**changes: object) -> Plan:
    return make_plan(settings(**changes), "digits", "linf", 0.15, has_surrogate=False)


def run(task: Task, seed: int = 0) -> Any:
    source = digits().test if task.split == "test" else digits().train
    parts = []
    for _, rows in task.shards():
        chosen = torch.from_numpy(rows)
        shard = Shard(trained(seed), None, source.fetch(chosen), source.labels[chosen], rows, CPU)
        parts.append(task.measurement.run(shard))
    return task.measurement.merge(parts)


def tasks(seed: int = 0) -> list[Task]:
    """Of the network that others are only compared with, no figures of its own."""
    data = digits()
    bank = bank_rows(torch.arange(len(data.train)), data.train.labels, 200)
    made = [*attack_tasks(plan(), data, MODEL), *embedding_tasks(plan(), data, MODEL, bank)]
    return made if seed else made + single_tasks(plan(), data, MODEL)


@cache
def measured(seed: int = 0) -> dict[tuple[str, str], Any]:
    # All stages with all queries take seconds.
    short = partial(suite.run_autoattack, only=("apgd-ce", "square"), square_queries=100)
    with patch.object(suite, "run_autoattack", short):
        return {task.key: run(task, seed) for task in tasks(seed)}


@cache
def found(seed: int = 0) -> fd.Findings:
    return fd.gather(measured(seed), MODEL, plan())


@cache
def of_the_gate(gate: bool) -> fd.Findings:
    """What was measured on the images set aside for the gate, or on the others."""
    chosen = digits().gate.numpy() == gate
    return fd.gather(select(measured(), tasks(), chosen), MODEL, plan())


def report(**changes: Any) -> rp.Report:
    own = found()
    threat = rp.ThreatModel(norm="linf", epsilon=0.15)
    facts = rp.ModelFacts(
        uri="models:/<b>digits</b>/1",
        weights_sha256="0" * 64,
        architecture="digits_cnn",
        method="tla",
        trained_for=threat,
    )
    other = rp.Compared(
        model=facts.model_copy(update={"uri": "other", "method": "at"}),
        accuracy=tb.accuracies(found(1), plan(), 10),
        difference=tb.differences(own, found(1), plan()),
    )
    fields = {
        "model": facts,
        "data": rp.DataFacts(name="digits", images=60, fingerprint="f", class_names=digits().class_names),
        "threat_model": threat,
        "accuracy": tb.accuracies(own, plan(), 10),
        "attacks": tb.attack_facts(plan()),
        "autoattack": tb.autoattack_facts(own, plan()),
        "curves": own.curves,
        "sparse": own.norms,
        "norms": tb.norm_table(own, plan(), "digits", digits().image_shape),
        "corruptions": own.corruptions,
        "calibration": own.calibration,
        "certified": own.certified,
        "detection": own.detection,
        "neighbours": tb.neighbours(own, plan()),
        "shift": tuple(ratios.at(epsilon) for epsilon, ratios in own.shift.items()),
        "compared": (other,),
        "seed": 0,
        "settings": "d",
        "seconds": 1.0,
        "hardware": "this",
        "gate": rp.GateFacts(images=15, accuracy=tb.accuracies(of_the_gate(True), plan(), 10)),
    }
    return rp.Report.model_validate(fields | changes)


class Page(HTMLParser):
    """Counts what a page is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            self.images.append(values)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def check(name: str, outcome: Any, figure: float | None = 0.0) -> dict[str, Any]:
    return {
        "name": name, "figure": figure, "threshold": 0.1, "outcome": outcome, "statement": f"{name} is so",
        "meaning": "it matters",
    }  # fmt: skip
