"""Training on one machine, without Ray or MLflow: one process, or one of a torchrun group."""

import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tla_service.config import RunConfig
from tla_service.errors import UnavailableError
from tla_service.files import expanded, locked_folder
from tla_service.job import log_as_json, stop_on_signal
from tla_service.runtime import WorkerContext, failing_together, process_group
from tla_service.training.fit import Run
from tla_service.training.network import check_network
from tla_service.training.output import FINISHED, open_output, show_summary, summarize, write_config, write_summary
from tla_service.training.precheck import check_room, checkpoint_bytes, kept_need
from tla_service.training.pretrained import check_source, find_pretrained
from tla_service.training.reporting import KEPT, JsonTerminal, LocalReporter, Terminal
from tla_service.training.watch import START_SECONDS, watched


def train(config: RunConfig, output: str | Path, *, json_logs: bool = False) -> dict[str, Any]:
    """Train a network, select its best weights on the validation split, and measure them on the test set.

    Called again with the same arguments, a run that was interrupted or killed resumes from its last checkpoint, and a
    finished run returns its summary without training.

    Args:
        config: The run; see `load_config`.
        output: Folder of `summary.json`, `config.yaml`, `log.jsonl` and `checkpoints/`; created if missing.
        json_logs: Print progress and logs as JSON lines instead of text.

    Returns:
        The content of `summary.json`: the accuracies that `evaluate` returns, `checkpoint`, a folder with the weights
        that `evaluate` and `load_model` accept, and more.

    Raises:
        ConfigError: The configuration does not fit the data, or `output` holds a different run.
        UnavailableError: The data, the GPU or the output folder is not available.
        KeyboardInterrupt: SIGINT or SIGTERM was received; a checkpoint has been saved.
    """
    output = expanded("output", output).absolute()
    use_gpu = torch.cuda.is_available() and config.scaling.use_gpu is not False
    if config.scaling.use_gpu is True and not use_gpu:
        remedy = "leave it out, or run where there is one"
        raise UnavailableError("scaling.use_gpu", True, "torch sees no GPU here", remedy)
    terminal = Terminal()
    device, hang_seconds = torch.device("cuda" if use_gpu else "cpu"), config.scaling.hang_seconds
    with process_group(device, hang_seconds) as context, contextlib.ExitStack() as locks:
        with failing_together(context):
            config.check_workers(context.world_size)
            check_source(config)
            if context.is_main:
                locks.enter_context(locked_folder(output, "output"))
            summary = open_output(config, output)
        if json_logs:
            labels = {"run": config.run_name, "rank": context.rank}
            log_as_json(labels)
            terminal = JsonTerminal(labels)
        if summary is None:
            summary = _train(config, output, context, terminal)
        elif context.is_main:
            terminal.say(FINISHED)
        if context.is_main:
            show_summary(summary, terminal)
    return summary


def _train(config: RunConfig, output: Path, context: WorkerContext, terminal: Terminal) -> dict[str, Any]:
    reporter = LocalReporter(output, is_main=context.is_main, terminal=terminal)
    stop = partial(setattr, reporter, "interrupted", True)
    with contextlib.closing(reporter), stop_on_signal("stopping after a checkpoint", stop):
        seconds = config.scaling.hang_seconds
        with watched(context, max(START_SECONDS, seconds), _tell_error):
            run = Run(config, context, reporter)
            with failing_together(context):
                network = run.build()
                check_network(config, run.architecture, network, run.dataset)
                found = find_pretrained(config, network)
            for note in found.notes if context.is_main else ():
                terminal.say(note)
            run.start(found.state_dict)
            with failing_together(context):
                if context.is_main:
                    need = kept_need(reporter.checkpoints, checkpoint_bytes(config, run.state.network), KEPT)
                    check_room({"output": need})
                    write_config(config, output)
        with watched(context, seconds, _tell_error):
            result = run.train()
    if result.interrupted:
        raise KeyboardInterrupt
    summary = summarize(config, result, reporter.latest())
    if context.is_main:
        write_summary(output, summary)
    return summary


def _tell_error(message: str) -> None:
    Terminal(sys.stderr).say(f"error: {message}")
