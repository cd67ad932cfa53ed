"""What every job does: exit codes, signals, one line per error, JSON log lines; the code and packages it runs on."""

import atexit
import contextlib
import gc
import getpass
import importlib.metadata
import json
import logging
import os
import platform
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import tla_service
from tla_service.errors import UserError, without_credentials

INTERRUPTED = 130
_UNREAD = 141  # as of a process that SIGPIPE ends
_GIT_TIMEOUT_SECONDS = 10


def run_job(main: Callable[[], int | None]) -> int:
    """Run a job's main function and convert exceptions to exit codes.

    2 for an invalid configuration, 3 if something is missing or unavailable, 130 if interrupted, 141 if nobody reads
    the output to its end (as in ``| head``), 1 for other errors.
    """
    # Else the interpreter examines every object of torch, Ray and MLflow again while it ends, which takes seconds.
    atexit.register(gc.freeze)
    # Read here and not from the settings, because reading those may be what fails.
    debug = "--debug" in sys.argv or os.environ.get("TLA_DEBUG", "").lower() in ("1", "true", "yes", "on")
    try:
        code = main() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except ExceptionGroup as group:
        return max(_tell(error, debug=debug) for error in group.exceptions)
    except Exception as error:  # noqa: BLE001 - the last resort for all errors
        return _UNREAD if isinstance(error, BrokenPipeError) and _output_is_closed() else _tell(error, debug=debug)
    else:
        return code


def _output_is_closed() -> bool:
    """Whether the reader of the standard output has gone, such as `head`; what is left goes nowhere then."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    is_closed = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    if is_closed:  # the interpreter flushes once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_closed


@contextlib.contextmanager
def stop_on_signal(message: str, stop: Callable[[], object]) -> Iterator[None]:
    """First SIGINT or SIGTERM: show the message and call `stop`; second: KeyboardInterrupt. Only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def handle(_signal: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        os.write(2, f"{message}; interrupt again to stop at once\n".encode())
        stop()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    print(f"error: {without_credentials(str(error))}", file=sys.stderr)
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


def log_as_json(labels: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Make this process log JSON lines only, with the labels of the time; other loggers than ours log warnings."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(labels))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("tla_service").setLevel(logging.INFO)


def code_version() -> dict[str, str]:
    """Tags with the package version and, in a git checkout, the commit and whether it has local changes."""
    tags = {"tla.version": tla_service.__version__}
    # Not of a repository that merely contains the environment in which this package is installed.
    commit = _git("rev-parse", "HEAD") if _git("ls-files", "__init__.py") else None
    if commit:
        changed = _git("status", "--porcelain", "--untracked-files=no")
        tags["tla.git_dirty"] = str(bool(changed)).lower()
    else:
        commit = os.environ.get("GIT_COMMIT")  # set when the image is built
    if commit:
        tags |= {"tla.git_commit": commit, "mlflow.source.git.commit": commit}
    tags["mlflow.source.name"] = Path(sys.argv[0]).name or "python"
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError):
        # A container may run with a user id without a name.
        tags["mlflow.user"] = str(os.getuid())
    return tags


def code_facts() -> dict[str, str]:
    """Version and, in a git checkout, commit, for reports."""
    tags = code_version()
    changed = " with changes" if tags.get("tla.git_dirty") == "true" else ""
    commit = {"commit": tags["tla.git_commit"][:12] + changed} if "tla.git_commit" in tags else {}
    return {"version": tags["tla.version"], **commit}


def environment() -> dict[str, Any]:
    """Python, machine, CUDA and every installed package with its version, as plain JSON."""
    import torch  # not needed by jobs that only ask for the code's version

    found = ((str(package.metadata["Name"] or ""), package.version) for package in importlib.metadata.distributions())
    packages = {name: version for name, version in sorted(found, key=lambda item: item[0].lower()) if name}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "torch": packages.get("torch"),
        "ray": packages.get("ray"),
        "cuda": torch.version.cuda,  # querying devices would create a GPU context in the driver
        "packages": packages,
    }


def _git(*arguments: str) -> str | None:
    """Output of a git command in this package's folder; None without git or outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
