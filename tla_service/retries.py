"""Retries with exponential backoff."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from tla_service.errors import one_line

LONGEST_WAIT_SECONDS = 30.0
_log = logging.getLogger(__name__)
T = TypeVar("T")


def retried(what: str, action: Callable[[], T], may_pass: Callable[[Exception], bool], *, seconds: float) -> T:
    """Call `action`; for some seconds, repeat it after errors that `may_pass`, waiting longer each time."""
    deadline, wait = time.monotonic() + seconds, 1.0
    while True:
        try:
            return action()
        except Exception as error:
            if not may_pass(error) or time.monotonic() + wait > deadline:
                raise
            _log.warning("%s failed (%s); trying again in %.0f s", what, one_line(error), wait)
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)
