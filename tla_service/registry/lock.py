"""A lock in the model registry, which has no compare-and-set but unique model names.

Each holder creates a registered model ``NAME-lock-GENERATION``, one generation above the highest. Creation is atomic:
only one of several contenders for a generation succeeds. A released generation is tagged and stays until the next one
exists, so a slow contender that creates an old generation sees the higher one and deletes its own. A contender takes
over from a dead holder once it has seen its generation unchanged for `STALE_SECONDS`, by its own clock. A live holder
must therefore call `check` before each write; it may hold the lock for a third of that time.
"""

import contextlib
import logging
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from tla_service.errors import UnavailableError
from tla_service.tracking.connection import is_passing, retrying, search_all

STALE_SECONDS = 90.0
_TIMEOUT_SECONDS = 900.0
_SHORTEST_WAIT_SECONDS, _LONGEST_WAIT_SECONDS = 0.02, 10.0
OWNER, _RELEASED = "tla.lock.owner", "tla.lock.released"  # tags; every lock has the first
_DESCRIPTION = "Promotion lock of tla-service. It has no versions; the highest generation is kept on purpose."
_log = logging.getLogger(__name__)


class RegistryLock:
    """See `registry_lock`; `generation` increases with every holder."""

    def __init__(self, made: MlflowClient, name: str) -> None:
        self.generation, self._deadline = 0, 0.0
        self._made, self._prefix = made, f"{name}-lock-"

    def check(self) -> None:
        """Raise `UnavailableError` if the lock was held too long, or is another's."""
        found = retrying("Reading the lock", self._generations)
        if time.monotonic() > self._deadline or max(found, default=0) != self.generation:
            reason = "the promotion lock was lost: the registry responds too slowly, or this process was suspended"
            raise UnavailableError("MLflow", None, reason, "give the same command again")

    def acquire(self, wanted: Callable[[], bool]) -> bool:
        """Wait for the lock; False once it is no longer wanted."""
        deadline = time.monotonic() + _TIMEOUT_SECONDS
        seen, since, wait = -1, time.monotonic(), _SHORTEST_WAIT_SECONDS
        while True:
            asked = time.monotonic()
            found = retrying("Reading the lock", self._generations)
            highest = max(found, default=0)
            if highest != seen:
                seen, since = highest, time.monotonic()
            is_free = found.get(highest, True)
            is_stale = not is_free and time.monotonic() - since > STALE_SECONDS
            if is_stale:
                _log.warning("Taking over a promotion lock that was held for %.0f s", STALE_SECONDS)
            if (is_free or is_stale) and self.take(highest + 1):
                return True
            if not wanted():
                return False
            if time.monotonic() > deadline:
                reason = f"other promotions held the lock {self._name(highest)} for {_TIMEOUT_SECONDS:.0f} s"
                raise UnavailableError("MLflow", None, reason, "look for a promotion that hangs, or try again later")
            # A busy server is polled less often, so that waiting does not slow down the holder.
            wait = min(max(1.5 * wait, 5 * (time.monotonic() - asked)), _LONGEST_WAIT_SECONDS)
            time.sleep(wait * random.uniform(0.5, 1.5))

    def take(self, generation: int) -> bool:
        """Create a generation; True if that makes this process the holder."""
        owner = uuid.uuid4().hex
        try:
            self._made.create_registered_model(self._name(generation), {OWNER: owner}, _DESCRIPTION)
        except (MlflowException, OSError) as error:
            if not is_passing(error) and getattr(error, "error_code", "") != "RESOURCE_ALREADY_EXISTS":
                raise
            # The response of a success may have been lost: the owner's tag tells.
            try:
                tags = self._made.get_registered_model(self._name(generation)).tags
            except (MlflowException, OSError):
                return False
            if tags.get(OWNER) != owner:
                return False
        found = retrying("Reading the lock", self._generations)
        if max(found) != generation:
            self._delete(generation)
            return False
        for lower in set(found) - {generation}:
            self._delete(lower)
        self.generation, self._deadline = generation, time.monotonic() + STALE_SECONDS / 3
        return True

    def release(self) -> None:
        """Let the next contender in."""
        self._made.set_registered_model_tag(self._name(self.generation), _RELEASED, "true")

    def _delete(self, generation: int) -> None:
        with contextlib.suppress(Exception):  # another contender has deleted it, or the next holder will
            self._made.delete_registered_model(self._name(generation))

    def _name(self, generation: int) -> str:
        return f"{self._prefix}{generation:08d}"

    def _generations(self) -> dict[int, bool]:
        """Existing generations, and whether each is released."""
        # MLflow's filters have no escape for a quote; "_" matches any character.
        like = self._prefix.replace("'", "_")
        found = search_all(self._made.search_registered_models, filter_string=f"name LIKE '{like}%'")
        pattern = re.compile(re.escape(self._prefix) + r"(\d{8})")
        matches = ((pattern.fullmatch(model.name), model) for model in found)
        return {int(match[1]): _RELEASED in model.tags for match, model in matches if match}


@contextlib.contextmanager
def registry_lock(
    made: MlflowClient, name: str, *, wanted: Callable[[], bool] = lambda: True
) -> Iterator[RegistryLock | None]:
    """Hold a lock against every process that uses the registry; None once `wanted`, polled while waiting, is false."""
    lock = RegistryLock(made, name)
    if not lock.acquire(wanted):
        yield None
        return
    try:
        yield lock
    finally:
        # A lock whose release fails becomes stale.
        with contextlib.suppress(Exception):
            retrying("Releasing the lock", lock.release)
