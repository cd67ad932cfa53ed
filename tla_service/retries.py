"""Retries while a service is unavailable."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

LONGEST_WAIT_SECONDS = 30.0
_log = logging.getLogger(__name__)
T = TypeVar("T")


def retried(
    what: str,
    action: Callable[[], T],
    may_pass: Callable[[Exception], bool],
    *,
    seconds: float,
    first_wait_seconds: float = 1.0,
) -> T:
    """Call `action`; retry transient failures with exponential backoff, and raise the last error.

    Args:
        what: Description for the warnings.
        action: The call.
        may_pass: Whether an error is transient.
        seconds: How long to keep trying.
        first_wait_seconds: Wait before the second attempt; doubles up to `LONGEST_WAIT_SECONDS`.
    """
    deadline, wait = time.monotonic() + seconds, first_wait_seconds
    while True:
        try:
            return action()
        except Exception as error:
            if not may_pass(error) or time.monotonic() + wait > deadline:
                raise
            _log.warning("%s failed (%s); trying again in %.0f s", what, " ".join(str(error).split())[:200], wait)
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)
