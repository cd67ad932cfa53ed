"""Write the results page of a study whose grid has seeds: each variant, and its difference from the first, by seed.

    python jobs/tune_tla.py --study ingredients --data.root /data/cifar10
    python -m docs.make_study ingredients RUN_ID

RUN_ID is the sweep's run in MLflow (MLFLOW_TRACKING_URI), whose nested runs are the trials. Figures of finished trials
are added to docs/results/ingredients.json, from which the page is written, so that a study may be run in parts.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from benchmarks.results import markdown
from tla_service.config.yaml_files import read_yaml
from tla_service.results.runs import Estimate
from tla_service.results.tuned_page import holm, paired_p

RESULTS = Path(__file__).parent / "results"
STUDIES = Path(__file__).parents[1] / "tla_service" / "config" / "presets" / "sweeps"
_ACCURACIES = {"clean": "test/clean_accuracy", "PGD-20": "test/robust_accuracy/pgd20"}
_LEVEL = 0.05


def finished_trials(client: MlflowClient, run_id: str, axis: str) -> Iterator[dict[str, Any]]:
    """Variant, seed, commit and accuracies of a sweep's trials."""
    query = f"tags.`mlflow.parentRunId` = '{run_id}' and tags.`tla.trial_status` = 'finished'"
    for run in client.search_runs([client.get_run(run_id).info.experiment_id], query, max_results=1000):
        tags = run.data.tags
        yield {
            "variant": tags[f"tla.searched.{axis}"],
            "seed": int(tags["tla.searched.seed"]),
            "commit": tags["tla.git_commit"][:12],
            "test_images": int(tags["tla.test_images"]),
            **{name: run.data.metrics[metric] for name, metric in _ACCURACIES.items()},
        }


def page(name: str, study: dict[str, Any], trials: Sequence[dict[str, Any]]) -> str:
    """The page; a verdict counts if p, by Holm's method over all comparisons of the page, is below 0.05."""
    axis, seeds = next(iter(study["sweep"]["space"])), study["sweep"]["space"]["seed"]
    first, *others = variants = list(study["sweep"]["space"][axis]["variants"])
    values = {
        (variant, column): {each["seed"]: each[column] for each in trials if each["variant"] == variant}
        for variant in variants
        for column in _ACCURACIES
    }
    differences = {}
    for variant in others:
        for column in _ACCURACIES:
            own, base = values[variant, column], values[first, column]
            differences[variant, column] = [own[seed] - base[seed] for seed in sorted(own.keys() & base.keys())]
    compared = [key for key, pairs in differences.items() if len(pairs) > 1]
    p = dict(zip(compared, holm([paired_p(differences[key]) for key in compared]), strict=True))
    rows = []
    for variant in variants:
        row = [variant, str(len(values[variant, "clean"]))]
        row += [_shown(list(values[variant, column].values()), ".1f") for column in _ACCURACIES]
        for column in _ACCURACIES:
            text = _shown(differences.get((variant, column), []), "+.1f")
            row.append(f"**{text}**" if p.get((variant, column), 1) < _LEVEL else text)
        rows.append(row)
    titles = [axis, "seeds", *_ACCURACIES, *(f"{column} less {first}" for column in _ACCURACIES)]
    missing = len(variants) * len(seeds) - len(trials)
    commits = ", ".join(sorted({each["commit"] for each in trials}))
    lines = [
        f"# The study `{name}`",
        "",
        f"Made by `python jobs/tune_tla.py --study {name}` at {commits}, one CPU core a run: preset "
        f"`{study['preset']}` with {study['training']['epochs']} epochs, {trials[0]['test_images']:,} test images.",
        "",
        *([f"**{missing} of {len(variants) * len(seeds)} runs are missing.**", ""] if missing else []),
        "Cells are means over seeds with Student's 95% interval, for the weights chosen on validation; differences are "
        f"taken seed by seed and are in points. Bold: p, corrected for the {len(p)} comparisons of this table by "
        f"Holm's method, is below {_LEVEL:g}.",
        "",
        *markdown(titles, rows),
        "",
    ]
    return "\n".join(lines)


def _shown(values: Sequence[float], digits: str) -> str:
    estimate = Estimate.over_seeds(values)
    return "" if estimate is None else estimate.text(digits)


def main(name: str, *run_ids: str) -> None:
    """Add the trials of the runs, and write the page."""
    study, kept = read_yaml(STUDIES / f"{name}.yaml", "study"), RESULTS / f"{name}.json"
    axis = next(iter(study["sweep"]["space"]))
    trials = json.loads(kept.read_text()) if kept.exists() else []
    for run_id in run_ids:
        trials += finished_trials(MlflowClient(), run_id, axis)
    known = {(each["variant"], each["seed"]): each for each in trials}
    order = list(study["sweep"]["space"][axis]["variants"])
    trials = sorted(known.values(), key=lambda each: (order.index(each["variant"]), each["seed"]))
    kept.write_text("[\n" + ",\n".join(map(json.dumps, trials)) + "\n]\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(page(name, study, trials), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
