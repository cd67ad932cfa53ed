"""Files in the storage, a folder that all nodes share or S3: a run's checkpoints, and small ones beside them."""

import contextlib
import errno
import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import ClassVar, TypeVar

from pyarrow import ArrowInvalid
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem, copy_files
from ray.train import Checkpoint
from ray.train.v2._internal.constants import AWS_RETRYABLE_TOKENS

from tla_service.config import RunConfig
from tla_service.config.loading import same_run
from tla_service.errors import ConfigError, UnavailableError, retried
from tla_service.files import expanded, remove_parts, whole_folder, write_whole

RETRY_SECONDS = 300.0  # how long an unavailable storage is retried
SHARED_SECONDS = 60.0  # after which a node sees what another wrote to a network file system, whatever it caches
_LATEST = "latest.json"
_CHUNK_BYTES = 64 * 2**20
PROBE_SECONDS = 20
_CREDENTIALS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role"
_UNREACHABLE = "check AWS_ENDPOINT_URL_S3, the network and HTTP_PROXY"
# Sign in pyarrow's error -> remedy.
_STORAGE_REMEDIES = {
    "NO_SUCH_BUCKET": "create the bucket, or correct its name or AWS_ENDPOINT_URL_S3",
    "ACCESS_DENIED": "allow these credentials to write and delete objects there (none are used if none are set)",
    "INVALID_ACCESS_KEY_ID": _CREDENTIALS,
    "INVALID_SIGNATURE": _CREDENTIALS,
    "SIGNATURE_DOES_NOT_MATCH": _CREDENTIALS,
    "EXPIRED_TOKEN": "renew the credentials",
    "HTTP status 301": "set AWS_DEFAULT_REGION to the bucket's region",
}
# Errors of a network file system whose server is unavailable.
_AWAY = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH,
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.ENOTCONN, errno.EREMOTEIO, errno.EAGAIN,
}  # fmt: skip
T = TypeVar("T")


class Folder:
    """A folder or s3:// prefix; what cannot be read or written raises UnavailableError."""

    remedy: ClassVar[str] = "repair it, then give the command with --resume"

    def __init__(self, uri: str) -> None:
        self.uri = uri if "://" in uri else str(expanded("scaling.storage", uri).absolute())
        with self._available():
            self.filesystem, path = FileSystem.from_uri(self.uri)
        self.path = path.rstrip("/")

    def folders(self) -> list[str]:
        """Names of the folders in it, sorted."""
        with self._available():
            found = self.filesystem.get_file_info(FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == FileType.Directory)

    def read(self, name: str) -> bytes | None:
        """A file's content; None if there is no such file."""
        path = f"{self.path}/{name}"
        with self._available():
            if self.filesystem.get_file_info(path).type == FileType.NotFound:
                return None
            with self.filesystem.open_input_stream(path) as file:
                return bytes(file.read())

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all; S3 shows an object once it is complete."""
        path = f"{self.path}/{name}"
        with self._available():
            if isinstance(self.filesystem, LocalFileSystem):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                write_whole(Path(path), content)
                return
            with self.filesystem.open_output_stream(path) as file:
                file.write(content)

    def delete(self, name: str) -> None:
        """Delete a file."""
        with self._available():
            self.filesystem.delete_file(f"{self.path}/{name}")

    def unavailable(self, error: Exception) -> UnavailableError:
        """What to raise when it cannot be used."""
        reason = f"cannot be read or written ({' '.join(str(error).split())[:300]})"
        return UnavailableError("scaling.storage", self.uri, reason, self.remedy)

    @contextlib.contextmanager
    def _available(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ArrowInvalid) as error:
            raise self.unavailable(error) from error


class StoredCheckpoint(Checkpoint):
    """A checkpoint in the storage; reading retries while the storage is unavailable."""

    @contextlib.contextmanager
    def as_directory(self) -> Iterator[str]:
        """A local folder with its files, one per worker: of Ray's shared one, workers would use what another left."""
        if isinstance(self.filesystem, LocalFileSystem):
            yield str(self.path)
            return
        with tempfile.TemporaryDirectory(prefix="tla-checkpoint-") as folder:
            yield self.to_directory(folder)

    def to_directory(self, path: str | os.PathLike[str] | None = None) -> str:
        """As Ray's; raises UnavailableError if the storage cannot be read, FileNotFoundError if it has none of it."""
        fetch = super().to_directory
        assert self.filesystem is not None
        try:
            address = f"{self.filesystem.type_name}://{self.path}"
            return patiently("Reading", address, lambda: str(fetch(path)))
        except UnavailableError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise error.__cause__ from None
            raise


class RunFolder(Folder):
    """The folder of a run, by its name, in the storage of all runs (a folder or s3:// prefix)."""

    remedy = "check bucket, credentials and AWS_ENDPOINT_URL_S3, or the folder's permissions"
    ATTEMPT = "attempt"  # a file that the driver writes and every worker reads

    def __init__(self, storage: str, name: str) -> None:
        super().__init__(f"{storage}/{name}")

    def checkpoints(self) -> list[StoredCheckpoint]:
        """All checkpoints, newest first, complete or not."""
        names = patiently("Listing", self.uri, self.folders)
        return [self.checkpoint(name) for name in reversed(names) if name.startswith("step-")]

    def checkpoint(self, name: str) -> StoredCheckpoint:
        """A checkpoint by name."""
        return StoredCheckpoint(f"{self.path}/{name}", self.filesystem)

    def save(self, checkpoint: Path, name: str) -> None:
        """Store a local checkpoint folder under a name, replacing an older one; retries for `RETRY_SECONDS`."""
        target = f"{self.path}/{name}"

        def write() -> None:
            if isinstance(self.filesystem, LocalFileSystem):
                remove_parts(Path(self.path), name)
                with whole_folder(Path(target)) as part:
                    copy_files(str(checkpoint), str(part))
            else:
                # Threads of one upload can deadlock (apache/arrow#32372).
                options = {"chunk_size": _CHUNK_BYTES, "use_threads": False}
                copy_files(str(checkpoint), target, destination_filesystem=self.filesystem, **options)
            self.write(_LATEST, json.dumps({"checkpoint": name}).encode())

        patiently("Writing", f"{self.uri}/{name}", write)

    def keep(self, kept: Collection[str]) -> None:
        """Delete all other checkpoints; those that cannot be deleted now are deleted with the next."""
        with contextlib.suppress(OSError, UnavailableError):
            for name in set(self.folders()) - set(kept):
                if name.startswith("step-"):
                    self.filesystem.delete_dir(f"{self.path}/{name}")

    def mark(self) -> str:
        """Write what `check_shared` looks for, and return it."""
        token = uuid.uuid4().hex
        self.write(self.ATTEMPT, token.encode())
        return token

    def check_shared(self, token: str) -> None:
        """Raise UnavailableError if another node's `mark` is not seen here, where checkpoints would be lost."""
        deadline = time.monotonic() + SHARED_SECONDS
        while patiently("Reading", self.uri, partial(self.read, self.ATTEMPT)) != token.encode():
            if time.monotonic() > deadline:
                reason = f"{socket.gethostname()} does not see what the driver wrote there"
                remedy = "give s3://bucket/prefix, or a folder that all nodes share"
                raise UnavailableError("scaling.storage", self.uri, reason, remedy)
            time.sleep(1)

    def check_record(self) -> str:
        """Whether the checkpoint that was recorded as the newest is there; returns what is wrong, or "".

        Raises UnavailableError if there is a record, but no checkpoint.
        """
        text = self.read(_LATEST)
        if text is None:
            return ""
        there, wrong = [checkpoint.path for checkpoint in self.checkpoints()], ""
        try:
            latest = f"{self.path}/{json.loads(text)['checkpoint']}"
            if latest not in there:
                wrong = f"checkpoint {latest} is missing"
        except (ValueError, KeyError, TypeError):
            wrong = f"the record of checkpoints, {self.path}/{_LATEST}, is damaged"
        if wrong and not there:
            remedy = f"restore its files, or delete {self.path} to start over"
            raise UnavailableError("scaling.storage", self.uri, f"{wrong}, and no other is left", remedy)
        return f"{wrong}; falling back to {there[0]}" if wrong else ""


def patiently(what: str, address: str, action: Callable[[], T]) -> T:
    """Call the storage, retrying for `RETRY_SECONDS` while it is away; messages name `what`, a participle."""
    try:
        return retried(f"{what} {address}", action, _may_pass, seconds=RETRY_SECONDS)
    except (OSError, ArrowInvalid) as error:
        reason = f"{what.lower()} failed ({' '.join(str(error).split())[:300]})"
        if _may_pass(error):
            remedy = "bring the storage back and give the same command again: it resumes from the last checkpoint"
        elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "free some space and give the same command again: it resumes from the last checkpoint"
        else:
            remedy = "check the rights to it, and credentials and AWS_ENDPOINT_URL_S3 for S3"
        raise UnavailableError("scaling.storage", address, reason, remedy) from error


def _may_pass(error: Exception) -> bool:
    cause = error.__cause__ if isinstance(error, UnavailableError) else error
    if not isinstance(cause, OSError):
        return False
    return cause.errno in _AWAY or any(token in str(cause) for token in AWS_RETRYABLE_TOKENS)


def check_storage(storage: str) -> None:
    """Write and delete a small file where checkpoints will be stored, within `PROBE_SECONDS`."""
    if "://" not in storage:
        folder = expanded("scaling.storage", storage)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            reason = f"cannot be written ({(error.strerror or str(error)).lower()})"
            remedy = "give a folder that can be written, or s3://bucket/prefix"
            raise UnavailableError("scaling.storage", folder, reason, remedy) from error
        return

    def write() -> None:
        filesystem, path = FileSystem.from_uri(storage)
        with filesystem.open_output_stream(f"{path}/.writable") as file:
            file.write(b"ok")
        filesystem.delete_file(f"{path}/.writable")

    try:
        in_background(write).result(PROBE_SECONDS)  # pyarrow waits minutes for an unreachable store
    except ArrowInvalid as error:
        reason = f"no address of a storage ({' '.join(str(error).split())})"
        raise ConfigError("scaling.storage", storage, reason, "give a folder, or s3://bucket/prefix") from error
    except (OSError, TimeoutError) as error:
        reason = " ".join(str(error).split())[:300] or f"no answer within {PROBE_SECONDS} seconds"
        remedy = next((words for sign, words in _STORAGE_REMEDIES.items() if sign in reason), _UNREACHABLE)
        raise UnavailableError("scaling.storage", storage, f"cannot be written ({reason})", remedy) from error


def in_background(call: Callable[[], T]) -> "Future[T]":
    """Call in a daemon thread, which does not keep the process from ending."""
    future = Future[T]()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised by `Future.result`
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def earlier_name(config: RunConfig, storage: str) -> RunConfig:
    """The run under the name of its folder in the storage; see `tla_service.config.loading.find_output`."""
    if config.name:
        return config
    stem, length = f"{config.name_stem}-", len(config.run_name)
    names = [name for name in RunFolder(storage, "").folders() if name.startswith(stem) and len(name) == length]
    if config.run_name in names:
        return config
    for name in names:
        folder = RunFolder(storage, name)
        for checkpoint in folder.folders():
            text = folder.read(f"{checkpoint}/config.yaml")
            if text is not None and same_run(text.decode(errors="replace"), config):
                return config.model_copy(update={"name": name})
    return config
