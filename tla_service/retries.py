"""Trying again while something that is needed is away."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from tla_service.errors import one_line

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
    """Call something; repeat it when it fails for a cause that may pass, waiting twice as long each time.

    Args:
        what: What is done, for the warnings.
        action: The call.
        may_pass: Whether the same call may succeed later, by what it raised.
        seconds: How long to keep trying.
        first_wait_seconds: Wait before the second attempt; no wait is longer than `LONGEST_WAIT_SECONDS`.

    Raises:
        Exception: What the last call raised.
    """
    deadline, wait = time.monotonic() + seconds, first_wait_seconds
    while True:
        try:
            return action()
        except Exception as error:
            if not may_pass(error) or time.monotonic() + wait > deadline:
                raise
            _log.warning("%s failed (%s); trying again in %.0f s", what, one_line(error), wait)
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)
