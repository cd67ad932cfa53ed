"""Measures a trained run, shard by shard, so that it can be stopped at any time; its results are a small file.

python -m tla_service.results.measure FOLDER
"""

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tla_service.config import DataConfig, RunConfig
from tla_service.config.loading import load_config_file
from tla_service.data import Dataset, load_dataset, split_validation
from tla_service.environment import code_facts
from tla_service.errors import UnavailableError
from tla_service.evaluation.outcomes import load_arrays, save_arrays, save_outcome
from tla_service.files import write_whole
from tla_service.job import run_job
from tla_service.models import build_model
from tla_service.report import findings as fd
from tla_service.report.audit_facts import autoattack_warnings
from tla_service.report.plan import attack_tasks, bank_rows, embedding_tasks, make_plan
from tla_service.report.settings import EvaluateSettings
from tla_service.report.tasks import Shard, Task, shard_file
from tla_service.runtime import hardware, keep_freed_memory
from tla_service.training.checkpoint import MANIFEST, read_weights
from tla_service.training.output import CONFIG

ORDER, MEASURED, OUTCOME, AUTOATTACK = "measure.json", "measured.json", "outcome.npz", "autoattack.npz"


@dataclass(frozen=True)
class Trained:
    """A trained run: its configuration and the best weights."""

    config: RunConfig
    weights: Mapping[str, Tensor]


# Runs tasks on a network and its surrogate, in a folder for shards; returns results by task key, and the hardware.
Results = dict[tuple[str, str], Any]
Runner = Callable[[Sequence[Task], Trained, Trained | None, Dataset, Path], tuple[Results, str]]


def write_order(folder: Path, settings: Mapping[str, Any], root: str | None, surrogate: str | None) -> None:
    """Write what `measure` needs to know of a run: settings of the evaluation, data root, name of the surrogate."""
    write_whole(folder / ORDER, json.dumps({"settings": settings, "root": root, "surrogate": surrogate}, indent=1))


def measure(folder: Path, run_tasks: Runner) -> None:
    """Measure the run in a folder; shards that were saved before are not measured again.

    Raises:
        UserError: The data or a checkpoint is missing.
    """
    order = json.loads((folder / ORDER).read_text())
    settings = EvaluateSettings(**order["settings"])
    run = _trained(folder)
    surrogate = None if order["surrogate"] is None else _trained(folder.parent / order["surrogate"])
    config = run.config
    dataset = load_dataset(DataConfig.model_validate(config.data.model_dump() | {"root": order["root"]}))
    plan = make_plan(
        settings, dataset.name, config.attack.norm, config.attack.epsilon, has_surrogate=surrogate is not None
    )
    rows, _ = split_validation(dataset.train.labels, config.data.validation_fraction, config.seed)
    bank = bank_rows(rows, dataset.train.labels, settings.images.bank)
    tasks = [*attack_tasks(plan, settings, dataset, "run"), *embedding_tasks(plan, settings, dataset, "run", bank)]
    results, device = run_tasks(tasks, run, surrogate, dataset, folder)
    found = fd.gather(results, "run", plan, settings)
    save_outcome(found.outcome, folder / OUTCOME)
    if found.autoattack is not None:
        save_outcome(found.autoattack, folder / AUTOATTACK)
    table = fd.accuracies(found, plan, len(dataset.class_names))
    detection = fd.detection_facts(found, plan, settings)
    votes = fd.neighbour_facts(found, plan, settings)
    code = code_facts()
    measured = {
        "accuracy": {name: result.overall._asdict() for name, result in table.items()},
        "detection": detection.model_dump() if detection is not None else None,
        "neighbours": votes.model_dump() if votes is not None else None,
        "shift": [ratios.model_dump() for ratios in fd.shift_facts(found)],
        "is_paper": plan.is_paper,
        "columns": [*plan.columns, *plan.transfer],
        "iterative": plan.iterative,
        "warnings": list(autoattack_warnings(found.autoattack)),
        "device": device,
        "code": code.get("commit", code["version"]),
    }
    write_whole(folder / MEASURED, json.dumps(measured, indent=1))
    shutil.rmtree(folder / "shards")


def _trained(folder: Path) -> Trained:
    found = sorted((folder / "checkpoints").glob(f"*/{MANIFEST}"))
    if not found:
        raise UnavailableError("state", folder, "has no checkpoint", "delete the folder to train the run again")
    return Trained(load_config_file(folder / CONFIG), read_weights(str(found[-1].parent)))


def run_here(
    tasks: Sequence[Task], run: Trained, surrogate: Trained | None, dataset: Dataset, folder: Path
) -> tuple[Results, str]:
    """Run tasks in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def network_of(trained: Trained) -> nn.Module:
        model = trained.config.model
        network = build_model(model.name, len(dataset.class_names), dataset.image_shape, model.normalization)
        network.load_state_dict(dict(trained.weights))
        return network.to(device).eval()

    network, other = network_of(run), None if surrogate is None else network_of(surrogate)
    results = {}
    for task in tasks:
        source, parts = dataset.train if task.split == "train" else dataset.test, []
        for name, rows in task.shards():
            path = shard_file(folder, name)
            try:
                parts.append(load_arrays(path))
            except UnavailableError:
                chosen = torch.from_numpy(rows)
                shard = Shard(source.fetch(chosen), source.labels[chosen], rows, device)
                parts.append(task.measurement.run(network, other, shard))
                save_arrays(parts[-1], path)
        results[task.key] = task.measurement.merge(parts)
    return results, hardware(device)


def main() -> int:
    """Measure the run in the folder of the command line."""
    keep_freed_memory()
    measure(Path(sys.argv[1]), run_here)
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
