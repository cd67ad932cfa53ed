"""What every job does: exit codes, one line per error instead of a traceback, JSON log lines."""

import json
import logging
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from tla_service.errors import UserError, without_credentials

INTERRUPTED = 130


def run_job(main: Callable[[], int | None]) -> int:
    """Run a job's main function and convert exceptions to exit codes.

    2 for an invalid configuration, 3 if something is missing or unavailable, 130 if interrupted, 1 for other errors.
    """
    # Read here and not from the settings, because reading those may be what fails.
    debug = "--debug" in sys.argv or os.environ.get("TLA_DEBUG", "").lower() in ("1", "true", "yes", "on")
    try:
        return main() or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except ExceptionGroup as group:
        return max(_tell(error, debug=debug) for error in group.exceptions)
    except Exception as error:  # noqa: BLE001 - the last resort for all errors
        return _tell(error, debug=debug)


def next_command(job: str, *arguments: str) -> str:
    """A line with the command to run next, a job in the folder of this one; credentials in URLs are left out."""
    python, folder = Path(sys.executable), Path.cwd()
    interpreter = str(python.relative_to(folder)) if python.is_relative_to(folder) else "python"
    command = [interpreter, str(Path(sys.argv[0]).with_name(job)), *map(without_credentials, arguments)]
    return f"next: {shlex.join(command)}"


def _tell(error: Exception, *, debug: bool) -> int:
    says_enough = type(error) is RuntimeError or type(error).__module__.startswith("tla_service.")
    if debug or not says_enough:
        print(without_credentials("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    text = " ".join(str(error).split("\n")) if isinstance(error, UserError) else str(error)
    print(f"error: {without_credentials(text)}", file=sys.stderr)
    return error.exit_code if isinstance(error, UserError) else 1


def json_line(level: str, fields: Mapping[str, Any]) -> str:
    """One line with `time` (seconds since 1970), `level` and the fields; values that are not JSON become text."""
    line = json.dumps({"time": round(time.time(), 3), "level": level, **fields}, default=str)
    return without_credentials(line)


class JsonFormatter(logging.Formatter):
    """Formats log records as JSON lines; `labels` are fields of every line."""

    def __init__(self, labels: Mapping[str, Any]) -> None:
        super().__init__()
        self.labels = labels

    def format(self, record: logging.LogRecord) -> str:
        """Format a record, including its traceback."""
        fields = {"logger": record.name, "message": record.getMessage(), **self.labels}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json_line(record.levelname.lower(), fields)


def log_as_json(labels: Mapping[str, Any], level: int = logging.INFO, stream: TextIO | None = None) -> None:
    """Make this process log JSON lines only, each with the labels: those that the mapping has at the time.

    The level is that of this project's loggers; others log warnings.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(labels))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("tla_service").setLevel(level)
