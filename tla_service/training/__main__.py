"""Train on one machine without Ray or MLflow: torch, torchvision and pydantic are enough.

    python -m tla_service.training --preset digits
    torchrun --nproc-per-node 4 -m tla_service.training --preset cifar10 --data.root /data/cifar10

The output folder holds `summary.json`, `config.yaml`, `log.jsonl` and `checkpoints/`; the same command resumes an
interrupted run from its last checkpoint. `jobs/train_tla.py` does the same on a cluster, and registers the model.
"""

import sys

from tla_service.config.loading import find_output, load_settings, print_config
from tla_service.job import run_job


def main() -> int:
    """Train in this process, or in this process's part of a torchrun group."""
    settings = load_settings()
    if settings.print_config:
        print(print_config(settings))
        return 0
    # Imported late: --help and a wrong configuration should not wait for torch.
    from tla_service.training.local import train

    config, output = find_output(settings)
    train(config, output, json_logs=settings.log_format == "json")
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
