"""Write the results page of a study whose grid has seeds: each variant, and its difference from the first, by seed.

    python jobs/tune_tla.py --study ingredients --data.root /data/cifar10
    python -m docs.make_study ingredients RUN_ID

RUN_ID is the sweep's run in MLflow (MLFLOW_TRACKING_URI), which holds every figure: trials are its nested runs.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from benchmarks.results import markdown
from tla_service.results.runs import Estimate
from tla_service.results.tuned_page import holm, paired_p

RESULTS = Path(__file__).parent / "results"
_SEARCHED, _ACCURACIES = "tla.searched.", {"test/clean_accuracy": "clean", "test/robust_accuracy/pgd20": "PGD-20"}
_LEVEL = 0.05


def trials_of(client: MlflowClient, run_id: str) -> list[Any]:
    """The finished trials of a sweep, in its order."""
    parent = client.get_run(run_id)
    query = f"tags.`mlflow.parentRunId` = '{run_id}' and tags.`tla.trial_status` = 'finished'"
    found = client.search_runs([parent.info.experiment_id], query, max_results=1000)
    return sorted(found, key=lambda run: int(run.data.tags["tla.trial"]))


def by_variant(trials: list[Any]) -> tuple[str, dict[str, dict[int, Mapping[str, float]]]]:
    """The axis beside the seed, and for each of its values the metrics by seed."""
    axes = {tag.removeprefix(_SEARCHED) for run in trials for tag in run.data.tags if tag.startswith(_SEARCHED)}
    (axis,) = axes - {"seed"}
    found: dict[str, dict[int, Mapping[str, float]]] = defaultdict(dict)
    for run in trials:
        found[run.data.tags[_SEARCHED + axis]][int(run.data.tags[f"{_SEARCHED}seed"])] = run.data.metrics
    return axis, dict(found)


def page(study: str, trials: list[Any]) -> str:
    """The page; a verdict counts if p, by Holm's method over all comparisons of the page, is below 0.05."""
    axis, variants = by_variant(trials)
    first, *others = variants
    values = {
        (name, metric): {seed: metrics[metric] for seed, metrics in runs.items()}
        for name, runs in variants.items()
        for metric in _ACCURACIES
    }
    differences = {}
    for name in others:
        for metric in _ACCURACIES:
            own, base = values[name, metric], values[first, metric]
            differences[name, metric] = [own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())]
    corrected = dict(zip(differences, holm([paired_p(pairs) for pairs in differences.values()]), strict=True))
    rows = []
    for name, runs in variants.items():
        row = [name, str(len(runs))]
        row += [_shown(list(values[name, metric].values()), ".1f") for metric in _ACCURACIES]
        for metric in _ACCURACIES:
            pairs = differences.get((name, metric))
            row.append("" if pairs is None else _shown(pairs, "+.1f", bold=corrected[name, metric] < _LEVEL))
        rows.append(row)
    titles = [axis, "seeds", *_ACCURACIES.values(), *(f"{title} less {first}" for title in _ACCURACIES.values())]
    commits = ", ".join(sorted({run.data.tags["tla.git_commit"][:12] for run in trials}))
    params = trials[0].data.params
    return "\n".join(
        [
            f"# {params['data.name']}: the study `{study}`",
            "",
            f"Made by `python jobs/tune_tla.py --study {study} --data.root /data/{params['data.name']}` at {commits}; "
            f"network `{params['model.name']}`, {params['training.epochs']} epochs, one CPU core a run; "
            f"{int(trials[0].data.tags['tla.test_images']):,} test images.",
            "",
            "Cells are means over seeds with Student's 95% interval, for the weights chosen on validation; differences "
            f"are taken seed by seed and are in points. Bold: p, corrected for the {len(differences)} comparisons of "
            f"this table by Holm's method, is below {_LEVEL:g}.",
            "",
            *markdown(titles, rows),
            "",
        ]
    )


def _shown(values: list[float], digits: str, *, bold: bool = False) -> str:
    estimate = Estimate.over_seeds(values)
    text = "" if estimate is None else estimate.text(digits)
    return f"**{text}**" if bold else text


if __name__ == "__main__":
    name, run_id = sys.argv[1:]
    (RESULTS / f"{name}.md").write_text(page(name, trials_of(MlflowClient(), run_id)), encoding="utf-8")
