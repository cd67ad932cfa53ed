"""A training job, from its configuration to a registered model."""

from pathlib import Path

import tla_service.cluster.elastic  # noqa: F401 - with ray.train, which would else be imported beside Ray's start
from tla_service.cluster.session import ray_session, starting
from tla_service.config import RunConfig
from tla_service.errors import ConfigError
from tla_service.files import locked_folder
from tla_service.training.output import FINISHED, open_output


def train_and_register(config: RunConfig, output: Path, *, debug: bool = False, json_logs: bool = False) -> int:
    """Train on Ray, track in MLflow, register the model; returns the job's exit code: 0, or 130 after an interrupt."""
    with locked_folder(output, "output"):
        finished = open_output(config, output)
        if (output / "checkpoints").exists():
            reason = "holds a run of python -m tla_service.training, which is neither tracked nor registered"
            raise ConfigError("output", output, reason, "choose another --output")
        if finished is None:
            with starting(ray_session(config.scaling, debug=debug)) as join:
                # Importing torch and MLflow, and the checks, take as long as Ray takes to start.
                from tla_service.workflows.run import run_training

                return run_training(config, output, join, json_logs=json_logs)
    from tla_service.workflows.run import open_terminal, show_end

    terminal, _ = open_terminal(config, json_logs=json_logs)
    terminal.say(FINISHED)
    show_end(finished, terminal)
    return 0
