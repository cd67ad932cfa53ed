"""After a sweep: its winner at full length over several seeds, measured on the test set and registered."""

import json
import statistics
from pathlib import Path
from typing import Any

from tla_service.cluster.pipeline import train_and_register
from tla_service.cluster.sweep_results import SUMMARY, WINNER
from tla_service.config import RunConfig
from tla_service.config_loading import load_config_file
from tla_service.errors import UnavailableError
from tla_service.training.reporting import Terminal

TABLE = "winner.json"


def train_winner(output: Path, num_seeds: int, *, debug: bool = False) -> int:
    """Train, evaluate and register the winner once a seed; seeds that have finished before are not repeated.

    Args:
        output: The sweep's output folder; each seed gets a folder in `winner/` there.
        num_seeds: Seeds, counted from the run's own.
        debug: Show what Ray and its workers log.

    Returns:
        The exit code of the first run that did not finish, or 0.

    Raises:
        UnavailableError: The sweep has no winner.
    """
    if not (output / WINNER).exists():
        raise UnavailableError("then_train", num_seeds, "the sweep has no winner", "see its trials.csv")
    config = load_config_file(output / WINNER)
    parent = json.loads((output / SUMMARY).read_text())["run_id"]
    terminal, summaries = Terminal(), []
    for seed in range(config.seed, config.seed + num_seeds):
        terminal.say("")
        terminal.say(f"the winner, seed {seed}")
        folder = output / "winner" / f"seed-{seed}"
        code = train_and_register(_with_seed(config, seed, parent), folder, debug=debug)
        if code != 0:
            return code
        summaries.append(json.loads((folder / "summary.json").read_text()))
    found = {"clean_accuracy": _spread([summary["clean_accuracy"] for summary in summaries])}
    for name in summaries[0]["robust_accuracy"]:
        found[f"robust_accuracy/{name}"] = _spread([summary["robust_accuracy"][name] for summary in summaries])
    models = [summary["model_uri"] for summary in summaries]
    (output / TABLE).write_text(json.dumps({"seeds": num_seeds, "test": found, "models": models}, indent=2))
    terminal.say("")
    terminal.say(f"the winner on the test set, {num_seeds} seeds:")
    for name, each in found.items():
        terminal.say(f"  {name:<28} {each['mean']:7.2%} ± {each['standard_deviation']:.2%}")
    return 0


def _with_seed(config: RunConfig, seed: int, parent_run_id: str) -> RunConfig:
    tags = config.tracking.tags | {"mlflow.parentRunId": parent_run_id}
    tracking = config.tracking.model_copy(update={"tags": tags})
    return config.model_copy(update={"seed": seed, "tracking": tracking})


def _spread(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.mean(values), "standard_deviation": deviation, "values": values}
