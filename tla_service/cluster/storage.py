"""A run's folder in its storage, which nodes share or which is on S3: its checkpoints, and which driver holds it."""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
from pyarrow import ArrowInvalid
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem
from ray.train import Checkpoint
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from tla_service.config import RunConfig
from tla_service.config_loading import same_run
from tla_service.errors import UnavailableError
from tla_service.files import write_whole
from tla_service.lock import Holder, in_use

BEAT_SECONDS = 5.0
SILENT_SECONDS = 30.0  # a holder elsewhere that is silent this long is taken for dead
_LEASE = "held_by.json"
_LEASE_FIELDS = {"host", "pid", "since", "command", "machine", "began", "id"}


class RunFolder:
    """The folder of a run.

    Args:
        storage: Folder or s3:// prefix of all runs.
        name: The run's name.

    Raises:
        UnavailableError: It cannot be reached; so do all methods that read or write.
    """

    def __init__(self, storage: str, name: str) -> None:
        self._storage = storage
        with self._trouble():
            self._files, root = FileSystem.from_uri(storage if "://" in storage else str(Path(storage).absolute()))
        self.path = f"{root}/{name}".rstrip("/")

    def checkpoints(self) -> list[Checkpoint]:
        """Its checkpoints, newest first, whole or not."""
        return [self.checkpoint(name) for name in sorted(self.names("step-"), reverse=True)]

    def checkpoint(self, name: str) -> Checkpoint:
        """One of them."""
        return Checkpoint(f"{self.path}/{name}", self._files)

    def forget_record(self) -> str:
        """Remove Ray's record of the checkpoints, which say themselves what they are.

        Ray refuses to start from a record that is damaged, of another version of Ray, or names a folder that is gone.

        Returns:
            What was wrong with it; empty for nothing.

        Raises:
            UnavailableError: There is a record, but no checkpoint is left.
        """
        path = f"{self.path}/{CHECKPOINT_MANAGER_SNAPSHOT_FILENAME}"
        text = self.read(path)
        if text is None:
            return ""
        there, wrong = sorted(self.names("step-")), ""
        try:
            latest = (json.loads(text)["latest_checkpoint_result"] or {}).get("checkpoint_dir_name")
            if latest is not None and latest not in there:
                wrong = f"checkpoint {self.path}/{latest} is missing"
        except (ValueError, KeyError, TypeError, AttributeError):
            wrong = f"Ray's record of checkpoints, {path}, is damaged"
        if wrong and not there:
            remedy = f"restore its files, or delete {self.path} to start over"
            raise UnavailableError("scaling.storage", self._storage, f"{wrong}, and no other is left", remedy)
        with self._trouble():
            self._files.delete_file(path)
        return f"{wrong}; falling back to {self.path}/{there[-1]}" if wrong else ""

    @contextlib.contextmanager
    def held(self, say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
        """Hold the folder against drivers on any machine.

        The holder rewrites a small file every few seconds. A driver that finds one on its own machine looks for the
        process; any other it watches, by its own clock, until the file changes or `SILENT_SECONDS` are over.

        Args:
            say: Told when this has to wait.

        Yields:
            Call it now and then: it raises ConfigError when another driver has taken the folder, because this one was
            silent for too long.

        Raises:
            ConfigError: Another driver holds it.
        """
        lease = {**asdict(Holder.here()), **_process(os.getpid()), "id": uuid.uuid4().hex, "beat": 0}
        self._wait_until_free(say)
        self._write(_LEASE, lease)
        over = threading.Event()
        taken: list[Any] = []

        def beat() -> None:
            while not over.wait(BEAT_SECONDS):
                # A storage that is away for a while does not end the run.
                with contextlib.suppress(UnavailableError):
                    now = self._lease()
                    if now is not None and now["id"] != lease["id"]:
                        taken.append(now)
                        return
                    lease["beat"] += 1
                    self._write(_LEASE, lease)

        def check() -> None:
            if taken:
                raise in_use("scaling.storage", self._storage, _holder(taken[0]))

        thread = threading.Thread(target=beat, name="storage-lease", daemon=True)
        thread.start()
        try:
            yield check
        finally:
            over.set()
            thread.join(BEAT_SECONDS)  # not longer, should it wait for a storage that is away
            with contextlib.suppress(UnavailableError, OSError):
                if not taken:
                    self._files.delete_file(f"{self.path}/{_LEASE}")

    def _wait_until_free(self, say: Callable[[str], None]) -> None:
        found = self._lease()
        if found is None or not _may_live(found):
            return
        if found["machine"] != _process(os.getpid())["machine"]:
            say(f"{self.path} was held by {_holder(found)}; watching for up to {SILENT_SECONDS:.0f} s if it still is")
            deadline = time.monotonic() + SILENT_SECONDS
            while time.monotonic() < deadline:
                time.sleep(min(1.0, BEAT_SECONDS / 2))
                now = self._lease()
                if now is None:
                    return
                if now != found:
                    break
            else:
                return
        raise in_use("scaling.storage", self._storage, _holder(found))

    def _lease(self) -> dict[str, Any] | None:
        text = self.read(f"{self.path}/{_LEASE}")
        try:
            lease = dict(json.loads(text or "{}"))
        except ValueError:
            return None
        return lease if lease.keys() >= _LEASE_FIELDS else None

    def names(self, beginning: str) -> list[str]:
        """Names of what is in it that begin so."""
        with self._trouble():
            found = self._files.get_file_info(FileSelector(self.path, allow_not_found=True))
            return [info.base_name for info in found if info.base_name.startswith(beginning)]

    def read(self, path: str) -> str | None:
        """A file's text; None if it is not there."""
        with self._trouble():
            if self._files.get_file_info(path).type == FileType.NotFound:
                return None
            with self._files.open_input_stream(path) as file:
                return bytes(file.read()).decode(errors="replace")

    def _write(self, name: str, content: dict[str, Any]) -> None:
        with self._trouble():
            if isinstance(self._files, LocalFileSystem):
                Path(self.path).mkdir(parents=True, exist_ok=True)
                write_whole(Path(self.path, name), json.dumps(content))
                return
            with self._files.open_output_stream(f"{self.path}/{name}") as file:
                file.write(json.dumps(content).encode())

    @contextlib.contextmanager
    def _trouble(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ArrowInvalid) as error:
            reason = f"cannot be read or written ({' '.join(str(error).split())[:300]})"
            remedy = "check bucket, credentials and AWS_ENDPOINT_URL_S3, or the folder's permissions"
            raise UnavailableError("scaling.storage", self._storage, reason, remedy) from error


def earlier_name(config: RunConfig, storage: str) -> RunConfig:
    """The run under the name that its folder in the storage has; see `tla_service.training.output.find_output`."""
    if config.name:
        return config
    runs = RunFolder(storage, "")
    names = [name for name in runs.names(f"{config.name_stem}-") if len(name) == len(config.run_name)]
    if config.run_name in names:
        return config
    for name in sorted(names):
        folder = RunFolder(storage, name)
        for checkpoint in folder.checkpoints():
            text = folder.read(f"{checkpoint.path}/config.yaml")
            if text is not None and same_run(text, config):
                return config.model_copy(update={"name": name})
    return config


def _process(pid: int) -> dict[str, Any]:
    """What tells a process from all others: its machine since it started, its container, and when it began."""
    machine = socket.gethostname()
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine = f"{machine} {boot} {Path('/proc/self/ns/pid').readlink()}"
    return {"machine": machine, "began": psutil.Process(pid).create_time()}


def _may_live(lease: dict[str, Any]) -> bool:
    """Whether a holder may live: on another machine, nothing is known of it."""
    if lease["machine"] != _process(os.getpid())["machine"]:
        return True
    try:
        process = psutil.Process(lease["pid"])
        is_same = abs(process.create_time() - lease["began"]) < 2
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _holder(lease: dict[str, Any]) -> Holder:
    return Holder(lease["host"], lease["pid"], lease["since"], lease["command"])
