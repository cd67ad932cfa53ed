"""Files beside a report for others to work with: results of single images, AutoAttack's images, the audit as SARIF."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tla_service import __version__
from tla_service.attacks.autoattack import ALL_STAGES
from tla_service.evaluation.results import share_of
from tla_service.evaluation.shards import ShardOutcome, save_arrays, standing_under_all
from tla_service.files import sha256, whole_file, write_whole
from tla_service.report.schema import ADVERSARIAL_FILE, REPORT_FILE, AdversarialFacts, Report

_SARIF_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
# By the outcome of a check: kind and level of a result (SARIF 2.1.0, sections 3.27.9 and 3.27.10).
_SARIF_KINDS = {"passed": ("pass", "none"), "failed": ("fail", "error"), "not run": ("open", "none")}


def write_images(
    table: ShardOutcome,
    strong: ShardOutcome | None,
    class_names: Sequence[str],
    path: Path,
    transfer: ShardOutcome | None = None,
) -> None:
    """Write a parquet file with a row per attacked test image, in the order of the test set.

    Columns: ``index`` in the test set, ``label`` and ``label_name``, ``gate``, ``predicted`` without an attack; per
    attack ``correct/NAME`` and ``broken_at/NAME``: null where the image is correct, 0 where it is misclassified without
    an attack, else the start that broke it, or AutoAttack's stage by name. Both are null where the attack was not run.
    ``correct/clean`` is without an attack, ``correct/worst`` under all attacks of the table and of relatives: both of
    the table's images, as in the report.

    Args:
        table: Outcome of the table's attacks, gate images marked.
        strong: That of AutoAttack; None: not run.
        class_names: In label order.
        path: The file.
        transfer: That of the examples of relatives; None: not run.
    """
    given = [each for each in (table, transfer, strong) if each is not None]
    index, first = np.unique(np.concatenate([each.indices for each in given]), return_index=True)

    def of_all(values: list[Any]) -> Any:
        return np.concatenate(values)[first]

    def column(outcome: ShardOutcome, values: Any, absent: Any = None) -> pa.Array:
        """Values (n,) of an outcome's images in their rows; null where absent (n,), and for other images."""
        rows = np.searchsorted(index, outcome.indices)
        spread, null = np.zeros(len(index), values.dtype), np.ones(len(index), dtype=bool)
        spread[rows], null[rows] = values, False if absent is None else absent
        return pa.array(spread, mask=null)

    labels = of_all([each.labels for each in given])
    columns = {
        "index": pa.array(index),
        "label": pa.array(labels),
        "label_name": pa.array([class_names[label] for label in labels]),
        "gate": pa.array(of_all([each.gate for each in given])),
        "predicted": pa.array(of_all([each.per_image["predicted"] for each in given])),
    }
    columns["correct/clean"] = column(table, table.standing("clean"))
    for outcome in given:
        for name in outcome.broken_at:
            if name == "clean":
                continue
            broken_at, correct = outcome.broken_at[name], outcome.standing(name)
            columns[f"correct/{name}"] = column(outcome, correct)
            if name == "autoattack":
                broken_at = np.array(["clean", *ALL_STAGES])[np.where(correct, 0, broken_at)]
            columns[f"broken_at/{name}"] = column(outcome, broken_at, correct)
    columns["correct/worst"] = column(table, standing_under_all(table, transfer))
    with whole_file(path) as part:
        pq.write_table(pa.table(columns), part)


def write_adversarial(strong: ShardOutcome, folder: Path) -> AdversarialFacts:
    """Write AutoAttack's images, unless they do not prove its figure: then the facts say why there is no file.

    Arrays are named as in RobustBench and AutoAttack: ``x_test`` and ``x_adv`` (N, C, H, W), float32 in [0, 1],
    ``y_test`` (N,); ``index`` in the test set and ``gate`` (N,) are ours. Every image is in the ball, and the network
    was right on those that AutoAttack could not break, and on no other, in one more forward pass.
    """
    kept, robust = strong.per_image, strong.standing("autoattack")
    clean, adversarial = kept["clean"], kept["adversarial"]
    differ = (kept["attacked"] == strong.labels) != robust
    if differ.any():
        reason = f"one more forward pass contradicts AutoAttack on {differ.sum()} of {len(differ)} images"
        return AdversarialFacts(file=None, reason=reason)
    assert strong.gate is not None
    arrays = {"x_adv": adversarial, "x_test": clean, "y_test": strong.labels}
    save_arrays(arrays | {"index": strong.indices, "gate": strong.gate}, folder / ADVERSARIAL_FILE)
    digest = sha256(folder / ADVERSARIAL_FILE)
    right = kept["predicted"] == strong.labels
    return AdversarialFacts(sha256=digest, images=len(right), clean=share_of(right[~strong.gate]))


def write_sarif(report: Report, path: Path) -> None:
    """Write the audit's checks as SARIF 2.1.0: a rule for each, and its result, of the model's weights."""
    assert report.audit is not None
    facts, threat = report.model, report.threat_model
    rules, results = [], []
    for place, check in enumerate(report.audit.checks):
        kind, level = _SARIF_KINDS[check.outcome]
        rules.append(
            {
                "id": check.name,
                "shortDescription": {"text": check.name.replace("_", " ")},
                "fullDescription": {"text": f"A failure means: {check.meaning}."},
                "defaultConfiguration": {"level": "error"},
            }
        )
        results.append(
            {
                "ruleId": check.name,
                "ruleIndex": place,
                "kind": kind,
                "level": level,
                "message": {"text": f"{check.statement}. A failure means: {check.meaning}."},
                "locations": [
                    {
                        "physicalLocation": {"artifactLocation": {"uri": REPORT_FILE}},
                        "logicalLocations": [{"name": facts.uri, "kind": "resource"}],
                    }
                ],
                "partialFingerprints": {"check/v1": f"{facts.weights_sha256[:12]}/{threat.slug}/{check.name}"},
                "properties": {"figure": check.figure, "threshold": check.threshold},
            }
        )
    driver = {"name": "tla-service", "version": __version__, "semanticVersion": __version__, "rules": rules}
    run = {
        "tool": {"driver": driver},
        "automationDetails": {"id": f"audit/{facts.weights_sha256[:12]}/{threat.slug}"},
        "results": results,
        "properties": {"trusted": report.audit.trusted, "images": report.audit.images, "threatModel": str(threat)},
    }
    content = {"$schema": _SARIF_SCHEMA, "version": "2.1.0", "runs": [run]}
    write_whole(path, json.dumps(content, indent=1))
