"""A lock that a registry can hold, although MLflow has no compare-and-set: registered models have unique names.

Each holder makes a registered model ``NAME-lock-GENERATION`` with a generation one above the highest there is. Making
one is atomic: of several who try the same generation, one succeeds. The highest generation stays when its holder lets
go, marked as released; lower ones are deleted. So a contender that was slow, and made a generation that has been and
gone, sees the higher one and takes its own back. A holder that died is passed over once a contender has watched its
generation unchanged for `STALE_SECONDS` on its own clock: clocks are never compared.

A holder that slept that long between a check and the write after it could write beside the next holder; it checks
before each write, and allows itself a third of the time.
"""

import contextlib
import logging
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tla_service.errors import UnavailableError
from tla_service.tracking.connection import is_passing, retrying

if TYPE_CHECKING:
    from mlflow import MlflowClient

STALE_SECONDS = 90.0
_SHORTEST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.02, 10.0
_OWNER, _RELEASED = "tla.lock.owner", "tla.lock.released"
_DESCRIPTION = "Lock of promotions (tla-service). It holds no versions; the highest number is kept on purpose."
_log = logging.getLogger(__name__)


class LockLostError(UnavailableError):
    """The lock was held too long and may be another's."""


class HeldLock:
    """A lock that is held; `generation` rises with every holder."""

    def __init__(self, made: "MlflowClient", prefix: str, generation: int, stale_seconds: float) -> None:
        self._made, self._prefix, self.generation = made, prefix, generation
        self._deadline = time.monotonic() + stale_seconds / 3

    def check(self) -> None:
        """Call before each write.

        Raises:
            LockLostError: Too much time has gone by, or somebody else holds it.
        """
        if time.monotonic() > self._deadline or max(_generations(self._made, self._prefix)) != self.generation:
            reason = "the lock of promotions was lost: the registry answers too slowly, or this process was stopped"
            raise LockLostError("MLflow", None, reason, "give the same command again")


@contextlib.contextmanager
def registry_lock(
    made: "MlflowClient",
    name: str,
    *,
    wanted: Callable[[], bool] = lambda: True,
    timeout_seconds: float = 900.0,
    stale_seconds: float = STALE_SECONDS,
) -> Iterator[HeldLock | None]:
    """Hold a lock against every other process that uses the same registry.

    Args:
        made: Client of the registry.
        name: What is locked.
        wanted: Asked while waiting; once it says no, the wait ends.
        timeout_seconds: How long to wait for it.
        stale_seconds: A holder that has held it this long is taken for dead.

    Yields:
        The lock; ``None`` where it is no longer wanted.

    Raises:
        UnavailableError: It was not free in that time.
    """
    prefix = f"{name}-lock-"
    generation = _acquire(made, prefix, wanted, timeout_seconds, stale_seconds)
    if generation is None:
        yield None
        return
    held = HeldLock(made, prefix, generation, stale_seconds)
    try:
        yield held
    finally:
        with contextlib.suppress(Exception):  # a lock that cannot be released goes stale
            mark = f"{prefix}{held.generation:08d}"
            retrying("Releasing the lock", lambda: made.set_registered_model_tag(mark, _RELEASED, "true"))


def _acquire(
    made: "MlflowClient", prefix: str, wanted: Callable[[], bool], timeout_seconds: float, stale_seconds: float
) -> int | None:
    deadline = time.monotonic() + timeout_seconds
    seen, since, wait = -1, time.monotonic(), _SHORTEST_WAIT_SECONDS
    while True:
        asked = time.monotonic()
        found = retrying("Reading the lock", lambda: _generations(made, prefix))
        highest = max(found, default=0)
        if highest != seen:
            seen, since = highest, time.monotonic()
        stale = time.monotonic() - since > stale_seconds
        if not found or found[highest] or stale:
            if stale and not found.get(highest, True):
                _log.warning("A promotion that held the lock for %.0f s is taken for dead", stale_seconds)
            if _take(made, prefix, highest + 1):
                return highest + 1
        if not wanted():
            return None
        if time.monotonic() > deadline:
            reason = f"other promotions held the lock {prefix}{highest:08d} for {timeout_seconds:.0f} s"
            raise UnavailableError("MLflow", None, reason, "look for a promotion that hangs, or try later")
        # A busy server is asked less often, so that waiting does not slow the holder down.
        wait = min(max(1.5 * wait, 5 * (time.monotonic() - asked)), _LONGEST_WAIT_SECONDS)
        time.sleep(wait * random.uniform(0.5, 1.5))


def _take(made: "MlflowClient", prefix: str, generation: int) -> bool:
    """Make the next generation; True if that makes this process the holder."""
    from mlflow.exceptions import MlflowException

    name, owner = f"{prefix}{generation:08d}", uuid.uuid4().hex
    try:
        made.create_registered_model(name, tags={_OWNER: owner}, description=_DESCRIPTION)
    except (MlflowException, OSError) as error:
        if not is_passing(error) and getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
            raise
        # An answer that was lost may hide a success: the owner's mark tells.
        if not _is_own(made, name, owner):
            return False
    found = retrying("Reading the lock", lambda: _generations(made, prefix))
    if max(found) != generation:
        _delete(made, name)
        return False
    for lower in found:
        if lower != generation:
            _delete(made, f"{prefix}{lower:08d}")
    return True


def _is_own(made: "MlflowClient", name: str, owner: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return bool(made.get_registered_model(name).tags.get(_OWNER) == owner)
    except (MlflowException, OSError):
        return False


def _delete(made: "MlflowClient", name: str) -> None:
    with contextlib.suppress(Exception):  # somebody else has, or the next holder will
        made.delete_registered_model(name)


def _generations(made: "MlflowClient", prefix: str) -> dict[int, bool]:
    """Generations that are there, and whether each is released."""
    pattern = re.compile(re.escape(prefix) + r"(\d{8})")
    found, token = {}, None
    while True:
        page = made.search_registered_models(f"name LIKE '{prefix}%'", max_results=100, page_token=token)
        for model in page:
            match = pattern.fullmatch(model.name)
            if match:
                found[int(match[1])] = _RELEASED in model.tags
        token = page.token
        if not token:
            return found
