"""Resuming from the newest intact checkpoint."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tla_service.errors import UnavailableError
from tla_service.runtime import WorkerContext, failing_together, gather_objects
from tla_service.training.checkpoint import RESUMABLE, find_damage


class Stored(Protocol):
    """A stored checkpoint and its path; `ray.train.Checkpoint` is one."""

    path: str

    def as_directory(self) -> contextlib.AbstractContextManager[str]:
        """A local folder with its files, within the block."""


@dataclass
class LocalCheckpoint:
    """A checkpoint on this machine."""

    path: str

    def as_directory(self) -> contextlib.AbstractContextManager[str]:
        """The folder itself."""
        return contextlib.nullcontext(self.path)


def restore(
    stored: Callable[[], Sequence[Stored]],
    load: Callable[[Path], None],
    context: WorkerContext,
    warn: Callable[[str], None],
) -> str:
    """Load the newest checkpoint that is intact on every worker; all workers call this together.

    Args:
        stored: Lists the checkpoints, newest first; called on rank 0.
        load: Loads one from its folder.
        context: This worker.
        warn: Called on rank 0 for each checkpoint that is skipped.

    Returns:
        Path of the checkpoint; empty if there is none.

    Raises:
        UserError: There are some but none can be used, or `load` refuses one.
    """
    own: Sequence[Stored] = ()
    with failing_together(context):
        if context.is_main:
            own = stored()
    checkpoints = gather_objects(own, context)[0]
    damages: list[str] = []
    for checkpoint in checkpoints:
        with contextlib.ExitStack() as opened:
            folder, damage = Path(), ""
            with failing_together(context):
                try:
                    folder = Path(opened.enter_context(checkpoint.as_directory()))
                    damage = find_damage(folder, RESUMABLE)
                except FileNotFoundError:
                    damage = "it is missing"
                except OSError as error:
                    reason = f"cannot be read ({' '.join(str(error).split())[:300]})"
                    raise UnavailableError("checkpoint", checkpoint.path, reason, "check the storage") from error
            damage = next(filter(None, gather_objects(damage, context)), "")
            if not damage:
                with failing_together(context):
                    load(folder)
                return checkpoint.path
        damages.append(damage)
        if context.is_main and len(damages) < len(checkpoints):
            older = checkpoints[len(damages)].path
            warn(f"checkpoint {checkpoint.path} cannot be used ({damage}); falling back to {older}")
    if damages:
        reason = damages[0] + ("; none of the older ones can be used either" if len(damages) > 1 else "")
        remedy = f"restore its files, or delete {Path(checkpoints[0].path).parent} to start over"
        raise UnavailableError("checkpoint", checkpoints[0].path, reason, remedy)
    return ""
