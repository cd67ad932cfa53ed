"""Search for better settings on Ray Tune.

python jobs/tune_tla.py --preset digits --sweep.num_samples 8
python jobs/tune_tla.py --preset cifar10 --data.root s3://bucket/cifar10 --sweep.num_samples 64 --then_train 3
"""

import sys
from pathlib import Path

from tla_service.config.loading import read_settings
from tla_service.files import expanded
from tla_service.job import next_command, run_job
from tla_service.tuning.settings import TuneSettings, sweep_yaml
from tla_service.tuning.space import Space


def main() -> int:
    """Read the configuration, search, and train the winner if asked to."""
    settings = read_settings(TuneSettings)
    run = settings.run_config
    if settings.print_config:
        print(sweep_yaml(run, settings.sweep).rstrip())
        return 0
    space = Space(run, settings.sweep)
    # Imported late: --help and a wrong space should not wait for torch, ray and mlflow.
    from tla_service.workflows.sweep import WINNER, run_sweep, train_winner

    output = expanded("output", settings.output or Path("runs") / space.name).absolute()
    code = run_sweep(run, space, output, resume=settings.resume, debug=settings.debug)
    if code == 0 and settings.then_train:
        return train_winner(space, output, settings.then_train, debug=settings.debug)
    if code == 0 and (output / WINNER).exists():
        print(next_command("train_tla.py", "--config", str(output / WINNER)))
    return code


if __name__ == "__main__":
    sys.exit(run_job(main))
