"""Write the results page of a study whose grid has seeds: each variant, and its difference from the first, by seed.

    python jobs/tune_tla.py --study ingredients --data.root /data/cifar10
    python -m docs.make_study ingredients RUN_ID [TRIALS]

RUN_ID is the sweep's run in MLflow (MLFLOW_TRACKING_URI), whose nested runs are the trials. TRIALS is the folder of
their checkpoints, in scaling.storage: with it, trials that the study did not attack on the margin are attacked now.
Run both on one machine: the page names its hardware.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient

import tla_service as tla
from benchmarks.results import markdown
from tla_service.config.loading import load_config_file
from tla_service.results.runs import Estimate
from tla_service.results.tuned_page import LEVEL, holm, paired_p
from tla_service.runtime import hardware

RESULTS = Path(__file__).parent / "results"
_SEARCHED, _SEED = "tla.searched.", "tla.searched.seed"
_ROUNDING = 5e-4  # another processor may decide a few images otherwise
_CLEAN, _MARGIN = "test/clean_accuracy", "test/robust_accuracy/margin20"
_ACCURACIES = {"clean": _CLEAN, "PGD-20": "test/robust_accuracy/pgd20", "PGD-20, margin": _MARGIN}


def trials_of(client: MlflowClient, run_id: str) -> list[Any]:
    """The runs of a sweep's trials, in its order; ValueError if one has not finished."""
    query = f"tags.`mlflow.parentRunId` = '{run_id}'"
    found = client.search_runs([client.get_run(run_id).info.experiment_id], query, max_results=1000)
    if any(run.data.tags.get("tla.trial_status") != "finished" for run in found):
        raise ValueError("not all trials have finished: continue the sweep with --resume")
    return sorted(found, key=lambda run: int(run.data.tags["tla.trial"]))


def attack_margins(client: MlflowClient, trials: Sequence[Any], folder: Path) -> None:
    """Add the accuracy under PGD-20 on the logit margin to trials without it; ValueError if weights are not theirs."""
    for run in (run for run in trials if _MARGIN not in run.data.metrics):
        trial = folder / run.info.run_name
        checkpoint = trial / json.loads((trial / "latest.json").read_text())["checkpoint"]
        epsilon = load_config_file(checkpoint / "config.yaml").attack.epsilon
        attack = tla.Attack(kind="cw", epsilon=epsilon, step_size=2 / 255, num_steps=20)
        found = tla.evaluate(checkpoint, attacks={"margin20": attack})
        if abs(found["clean_accuracy"] - run.data.metrics[_CLEAN]) > _ROUNDING:
            raise ValueError(f"{checkpoint}: its accuracy is not that of run {run.info.run_id}")
        client.log_metric(run.info.run_id, _MARGIN, found["robust_accuracy"]["margin20"])


def page(study: str, trials: Sequence[Any], device: str) -> str:
    """The page; differences are bold if p, by Holm's method over all comparisons of the page, is below the level."""
    params, tags = trials[0].data.params, trials[0].data.tags
    (axis,) = (tag.removeprefix(_SEARCHED) for tag in tags if tag.startswith(_SEARCHED) and tag != _SEED)
    variants: dict[str, dict[str, Mapping[str, float]]] = defaultdict(dict)
    for run in trials:
        variants[run.data.tags[_SEARCHED + axis]][run.data.tags[_SEED]] = run.data.metrics
    accuracies = {column: metric for column, metric in _ACCURACIES.items() if metric in trials[0].data.metrics}
    first, *others = variants
    differences = {
        (name, column): [metrics[metric] - variants[first][seed][metric] for seed, metrics in variants[name].items()]
        for name in others
        for column, metric in accuracies.items()
    }
    p = dict(zip(differences, holm([paired_p(pairs) for pairs in differences.values()]), strict=True))
    rows = []
    for name, runs in variants.items():
        row = [name, str(len(runs))]
        row += [_shown([metrics[metric] for metrics in runs.values()], ".1f") for metric in accuracies.values()]
        for column in accuracies:
            text = _shown(differences.get((name, column), []), "+.1f")
            row.append(f"**{text}**" if p.get((name, column), 1) < LEVEL else text)
        rows.append(row)
    titles = [axis, "seeds", *accuracies, *(f"{column} less {first}" for column in accuracies)]
    commits = ", ".join(sorted({run.data.tags["tla.git_commit"][:12] for run in trials}))
    steps = params["training.max_steps"]
    length = f"{params['training.epochs']} epochs" if steps == "null" else f"{steps} steps"
    extra = any(run.data.params.get("data.extra.path", "null") != "null" for run in trials)
    lines = [
        f"# {params['data.name']}: the study `{study}`",
        "",
        f"Made by `python jobs/tune_tla.py --study {study} --data.root /data/{params['data.name']}"
        f"{' --data.extra.path /data/extra.npz' if extra else ''}` at {commits} on "
        f"{device}; network `{params['model.name']}`, {length}, "
        f"{int(tags['tla.test_images']):,} test images.",
        "",
        "Cells are means over seeds with Student's 95% interval, for the weights chosen on validation; differences are "
        f"taken seed by seed and are in points. Bold: p, corrected for the {len(p)} comparisons of this table by "
        f"Holm's method, is below {LEVEL:g}.",
        "",
        *markdown(titles, rows),
        "",
    ]
    return "\n".join(lines)


def _shown(values: Sequence[float], digits: str) -> str:
    estimate = Estimate.over_seeds(values)
    return "" if estimate is None else estimate.text(digits)


def main(study: str, run_id: str, folder: str | None = None) -> None:
    """Write the page."""
    client = MlflowClient()
    if folder is not None:
        attack_margins(client, trials_of(client, run_id), Path(folder))
    text = page(study, trials_of(client, run_id), hardware(torch.device("cpu")))
    (RESULTS / f"{study}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
