"""A training job, from its configuration to a registered model."""

from pathlib import Path

from tla_service.cluster.session import ray_session, starting
from tla_service.config import RunConfig
from tla_service.files import locked_folder
from tla_service.training.output import open_output


def train_and_register(config: RunConfig, output: Path, *, debug: bool = False, json_logs: bool = False) -> int:
    """Train on Ray, track in MLflow, register the model.

    Args:
        config: The run.
        output: Folder for `summary.json`, `config.yaml`, `log.jsonl`, figures, the newest checkpoint and, unless
            `scaling.storage` is set, the run's checkpoints.
        debug: Show the log of Ray and its workers.
        json_logs: Write progress and log as JSON lines, with run, run id and rank.

    Returns:
        The job's exit code: 0, or 130 after an interrupt.

    Raises:
        UserError: Something is wrong or missing, or another process uses the output folder; raised before workers
            start wherever it can be known.
    """
    with locked_folder(output, "output"):
        finished = open_output(config, output)
        if finished is None:
            with starting(ray_session(config, debug=debug)) as join:
                # Importing torch and MLflow, and the checks, take as long as Ray takes to start.
                from tla_service.workflows.run import run_training

                return run_training(config, output, join, json_logs=json_logs)
    from tla_service.workflows.run import open_terminal, show_end

    terminal, _ = open_terminal(config, json_logs=json_logs)
    terminal.say("this run has finished before; to train again choose another --name, --seed or --output")
    show_end(finished, terminal)
    return 0
