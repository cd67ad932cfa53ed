"""JSON log lines: every line parses, and says which run and rank it is about."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from tla_service.job import log_as_json
from tla_service.training.reporting import JsonTerminal, Terminal


@pytest.fixture
def root_logger() -> Iterator[None]:
    """Put the root logger back as pytest needs it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.getLogger("tla_service").setLevel(logging.NOTSET)


def parsed(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


@pytest.mark.usefixtures("root_logger")
def test_no_output_shows_credentials() -> None:
    uri = "http://me:hunter2@mlflow:5000"
    log, lines, text = io.StringIO(), io.StringIO(), io.StringIO()
    log_as_json({}, stream=log)
    logging.getLogger("tla_service").warning("%s is down", uri)
    try:
        int(uri)
    except ValueError:
        logging.getLogger("tla_service").exception("it failed")
    JsonTerminal({}, lines).say(uri)
    JsonTerminal({}, lines).show({"event": "warning", "message": uri})
    Terminal(text).say(uri)
    Terminal(text).show({"event": "warning", "message": uri})
    for stream in (log, lines, text):
        written = stream.getvalue()
        assert written.count("http://mlflow:5000") == 2 if stream is not log else 3
        assert "hunter2" not in written


@pytest.mark.usefixtures("root_logger")
def test_log_lines_carry_run_rank_and_traceback_and_nothing_else_is_logged() -> None:
    stream = io.StringIO()
    log_as_json({"run": "r", "run_id": "1a", "rank": 3}, stream=stream)
    logging.getLogger("tla_service.data").info("copied %d files\nin two lines", 5)
    logging.getLogger("botocore").info("chatter")
    try:
        int("lost")
    except ValueError:
        logging.getLogger("tla_service").exception("it failed")
    told, failed = parsed(stream)
    assert (told["run"], told["run_id"], told["rank"], told["level"]) == ("r", "1a", 3, "info")
    assert told["message"] == "copied 5 files\nin two lines"
    assert failed["level"] == "error"
    assert failed["traceback"].endswith("'lost'")


def test_progress_becomes_lines_whose_run_id_is_filled_in_once_it_is_known() -> None:
    stream, labels = io.StringIO(), {"run": "r", "run_id": "", "rank": "driver"}
    terminal = JsonTerminal(labels, stream)
    terminal.say("begin")
    terminal.say("")
    labels["run_id"] = "1a"
    terminal.show({"event": "step", "epoch": 0, "step": 5, "total_steps": 9, "loss": 1.5})
    terminal.show({"event": "failure", "message": "workers failed"})
    terminal.close()
    lines = parsed(stream)
    assert [line.get("message", line.get("event")) for line in lines] == ["begin", "step", "workers failed"]
    assert [line["run_id"] for line in lines] == ["", "1a", "1a"]
    assert [line["level"] for line in lines] == ["info", "info", "warning"]
    assert lines[1]["loss"] == 1.5
