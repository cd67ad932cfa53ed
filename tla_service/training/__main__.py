"""Train on one machine without Ray or MLflow: torch, torchvision and pydantic are enough.

    python -m tla_service.training --preset digits
    torchrun --nproc-per-node 4 -m tla_service.training --preset cifar10 --data.root /data/cifar10

The output folder holds `summary.json`, `config.yaml`, `log.jsonl` and `checkpoints/`; started again, a run resumes from
its newest checkpoint. `jobs/train_tla.py` does the same on a cluster, and registers the model.
"""

import contextlib
import signal
import sys
from pathlib import Path

import torch

from tla_service.config import RunConfig
from tla_service.config.loading import find_output, load_settings, print_config
from tla_service.errors import UnavailableError
from tla_service.job import INTERRUPTED, run_job
from tla_service.lock import locked_folder
from tla_service.logs import log_as_json
from tla_service.runtime import WorkerContext, failing_together, process_group
from tla_service.training.checkpoint import read_weights
from tla_service.training.fit import Run
from tla_service.training.output import open_output, show_summary, summarize, write_config, write_summary
from tla_service.training.precheck import check_room, checkpoint_bytes, kept_need
from tla_service.training.reporting import KEPT, JsonTerminal, LocalReporter, Terminal


def main() -> int:
    """Train in this process, or in this process's part of a torchrun group."""
    settings = load_settings()
    if settings.print_config:
        print(print_config(settings))
        return 0
    config, output = find_output(settings)
    use_gpu = torch.cuda.is_available() and config.scaling.use_gpu is not False
    if config.scaling.use_gpu is True and not use_gpu:
        remedy = "leave it out, or run where there is one"
        raise UnavailableError("scaling.use_gpu", True, "torch sees no GPU here", remedy)
    terminal = Terminal()
    with process_group(torch.device("cuda" if use_gpu else "cpu")) as context, contextlib.ExitStack() as locks:
        config.check_workers(context.world_size)
        with failing_together(context):
            if context.is_main:
                locks.enter_context(locked_folder(output, "output"))
            finished = open_output(config, output)
        if settings.log_format == "json":
            labels = {"run": config.run_name, "rank": context.rank}
            log_as_json(labels)
            terminal = JsonTerminal(labels)
        if finished is None:
            return _train(config, output, context, terminal)
        if context.is_main:
            show_summary(finished, terminal)
    return 0


def _train(config: RunConfig, output: Path, context: WorkerContext, terminal: Terminal) -> int:
    with contextlib.closing(LocalReporter(output, is_main=context.is_main, terminal=terminal)) as reporter:
        stop_on_signals(reporter)
        run = Run(config, context, reporter)
        run.start(read_weights(config.model.weights) if config.model.weights else None)
        with failing_together(context):
            if context.is_main:
                need = kept_need(reporter.checkpoints, checkpoint_bytes(config, run.state.network), KEPT)
                check_room({"output": need})
                write_config(config, output)
        result = run.train()
    if result.interrupted:
        return INTERRUPTED
    if context.is_main:
        summary = summarize(config, result, reporter.latest())
        write_summary(output, summary)
        show_summary(summary, terminal)
    return 0


def stop_on_signals(reporter: LocalReporter) -> None:
    """First SIGINT or SIGTERM: stop after a checkpoint; second: immediately."""

    def handle(number: int, _frame: object) -> None:
        reporter.interrupted = True
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


if __name__ == "__main__":
    sys.exit(run_job(main))
