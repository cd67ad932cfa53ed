"""One trained run, measured: shard by shard, so that it can be stopped at any time; then its figures as a small file.

python -m tla_service.results.measure FOLDER
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tla_service.config import DataConfig, RunConfig
from tla_service.config.loading import CONFIG, load_config_file
from tla_service.data import Dataset, load_dataset, split_validation
from tla_service.environment import code_facts
from tla_service.errors import UnavailableError
from tla_service.evaluation.outcomes import load_arrays, save_arrays, save_outcome
from tla_service.files import write_whole
from tla_service.job import run_job
from tla_service.models import build_model
from tla_service.report import findings as fd
from tla_service.report.audit_facts import autoattack_warnings
from tla_service.report.plan import Plan, attack_tasks, bank_rows, embedding_tasks, make_plan
from tla_service.report.settings import EvaluateSettings
from tla_service.report.tasks import Shard, Task, shard_file
from tla_service.runtime import hardware, keep_freed_memory
from tla_service.training.checkpoint import MANIFEST, read_weights

ORDER, MEASURED, OUTCOME, AUTOATTACK = "measure.json", "measured.json", "outcome.npz", "autoattack.npz"


def main() -> int:
    """Measure the run in the folder of the command line, from where it was stopped."""
    keep_freed_memory()
    folder = Path(sys.argv[1])
    order = json.loads((folder / ORDER).read_text())
    settings = EvaluateSettings(**order["settings"])
    config = load_config_file(folder / CONFIG)
    data = DataConfig.model_validate(config.data.model_dump() | {"root": order["root"]})
    dataset = load_dataset(data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = _network(folder, config, dataset, device)
    surrogate = None
    if order["surrogate"] is not None:
        other = folder.parent / order["surrogate"]
        surrogate = _network(other, load_config_file(other / CONFIG), dataset, device)
    plan = make_plan(
        settings, dataset.name, config.attack.norm, config.attack.epsilon, has_surrogate=surrogate is not None
    )
    rows, _ = split_validation(dataset.train.labels, config.data.validation_fraction, config.seed)
    bank = bank_rows(rows, dataset.train.labels, settings.images.bank)
    tasks = [*attack_tasks(plan, settings, dataset, "run"), *embedding_tasks(plan, settings, dataset, "run", bank)]
    for task in tasks:
        _measure(task, network, surrogate, dataset, folder, device)
    results = {task.key: _merge(task, folder) for task in tasks}
    found = fd.gather(results, "run", plan, settings)
    save_outcome(found.outcome, folder / OUTCOME)
    if found.autoattack is not None:
        save_outcome(found.autoattack, folder / AUTOATTACK)
    figures = _figures(found, plan, settings, dataset)
    figures["device"] = hardware(device)
    figures["seconds"] = _seconds(folder)
    code = code_facts()
    figures["code"] = code.get("commit", code["version"])
    write_whole(folder / MEASURED, json.dumps(figures, indent=1))
    shutil.rmtree(folder / "shards")
    return 0


def _network(folder: Path, config: RunConfig, dataset: Dataset, device: torch.device) -> nn.Module:
    """The best weights of a finished run."""
    found = sorted((folder / "checkpoints").glob(f"*/{MANIFEST}"))
    if not found:
        raise UnavailableError("state", folder, "holds no checkpoint", "delete the folder; the run is made again")
    shape = dataset.image_shape
    network = build_model(config.model.name, len(dataset.class_names), shape, config.model.normalization)
    network.load_state_dict(read_weights(str(found[-1].parent)))
    return network.to(device).eval()


def _measure(
    task: Task, network: nn.Module, surrogate: nn.Module | None, dataset: Dataset, folder: Path, device: torch.device
) -> None:
    """All shards of a task that are not there yet."""
    source = dataset.train if task.split == "train" else dataset.test
    for name, rows in task.shards():
        path = shard_file(folder, name)
        try:
            load_arrays(path)
        except UnavailableError:
            began = time.process_time()
            chosen = torch.from_numpy(rows)
            shard = Shard(source.fetch(chosen), source.labels[chosen], rows, device)
            save_arrays(task.measurement.run(network, surrogate, shard), path)
            _count_seconds(folder, task.name, time.process_time() - began)


def _merge(task: Task, folder: Path) -> Any:
    return task.measurement.merge([load_arrays(shard_file(folder, name)) for name, _ in task.shards()])


def _seconds(folder: Path) -> dict[str, float]:
    path = folder / "seconds.json"
    found: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _count_seconds(folder: Path, name: str, seconds: float) -> None:
    """Add to the processor time of a measure."""
    found = _seconds(folder)
    write_whole(folder / "seconds.json", json.dumps(found | {name: round(found.get(name, 0.0) + seconds, 2)}))


def _figures(found: fd.Findings, plan: Plan, settings: EvaluateSettings, dataset: Dataset) -> dict[str, Any]:
    table = fd.accuracies(found, plan, len(dataset.class_names))
    detection = fd.detection_facts(found, plan, settings)
    votes = fd.neighbour_facts(found, plan, settings)
    return {
        "accuracy": {name: result.overall._asdict() for name, result in table.items()},
        "detection": detection.model_dump() if detection is not None else None,
        "neighbours": votes.model_dump() if votes is not None else None,
        "shift": [ratios.model_dump() for ratios in fd.shift_facts(found)],
        "is_paper": plan.is_paper,
        "columns": [*plan.columns, *plan.transfer],
        "iterative": plan.iterative,
        "warnings": list(autoattack_warnings(found.autoattack)),
    }


if __name__ == "__main__":
    sys.exit(run_job(main))
