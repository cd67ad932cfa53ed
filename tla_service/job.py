"""Exit codes of jobs, and one line per error instead of a traceback."""

import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

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
