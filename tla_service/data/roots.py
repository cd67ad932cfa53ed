"""``data.root`` as a local path: the path itself, or a copy of an s3:// prefix.

The only module that imports boto3, and only when it is needed. Endpoint and credentials come from the usual AWS
environment variables, profiles and roles.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tla_service.config import DataConfig
from tla_service.data.cache import cache_folder, disk_trouble, locked
from tla_service.data.trees import is_member
from tla_service.errors import ConfigError, UnavailableError
from tla_service.files import expanded, write_whole

LOG = logging.getLogger(__name__)
SCHEME = "s3://"
_WAITS_SECONDS = (1.0, 2.0, 4.0, 8.0)  # between the attempts to copy
_READ_SECONDS, _DOWNLOADS, _BATCH = 20, 8, 1000
_LISTING = ".listing.json"  # hidden, so no part of the data set
_KEY_FIX = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role"
_DENIED = ("access denied", "allow these credentials to list the bucket and read its objects")
_REFUSED = ("the credentials are refused", _KEY_FIX)
_ELSEWHERE = ("the bucket is in another region", "set AWS_DEFAULT_REGION")
_EMPTY = ("no objects there", "check the prefix")
_CHANGING = ("its objects keep changing", "wait until the upload is done")
_MEANINGS = {
    "NoSuchBucket": ("the bucket does not exist", "check the name and AWS_ENDPOINT_URL_S3"),
    "ExpiredToken": ("the credentials have expired", "renew them"),
    **dict.fromkeys(("AccessDenied", "403"), _DENIED),
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"), _REFUSED),
    **dict.fromkeys(("PermanentRedirect", "AuthorizationHeaderMalformed"), _ELSEWHERE),
    **dict.fromkeys(("NoSuchKey", "404", "PreconditionFailed", "412"), _CHANGING),
}


class RemoteObject(NamedTuple):
    """One object of a listing: its key, or its path below the prefix; size in bytes; and ETag."""

    name: str
    size: int
    etag: str


class TransientError(UnavailableError):
    """Reading failed for a cause that may pass."""


def check_root(root: str | None) -> None:
    """Check in seconds, without a copy, that a root, if any, can be read; else ConfigError or UnavailableError."""
    if root is not None and root.startswith(SCHEME):
        with contextlib.closing(Prefix(root)) as prefix:
            prefix.check()
    elif root is not None:
        _local(root, create=False)


def required_root(config: DataConfig) -> Path:
    """The local path of ``data.root``, up to date; errors as `check_root`, or if none is given."""
    root = config.root
    if root is None:
        raise ConfigError("data.root", None, f"{config.name} is not embedded", "give a folder, or s3://bucket/prefix")
    return copy_prefix(root, config.cache_dir) if root.startswith(SCHEME) else _local(root, create=config.download)


def _local(root: str, *, create: bool) -> Path:
    if "://" in root:
        raise ConfigError("data.root", root, "only local paths and s3:// can be read", "copy the data to one of them")
    path = expanded("data.root", root)
    with disk_trouble("data.root", root, "check the path and its permissions"):
        if create:
            path.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            remedy = "check the path; on a cluster, on every node"
            raise UnavailableError("data.root", root, "no such file or folder", remedy)
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise UnavailableError("data.root", root, "no permission", "let this user read it")
    return path


def copy_prefix(root: str, cache_dir: str) -> Path:
    """Copy all objects below an s3:// address into the cache, once per node.

    A complete copy is a folder named by the digest of the listing (names, sizes, ETags), so it never changes: another
    listing makes another copy, and unchanged objects are hard links. A folder gets its name when a second listing
    equals the first. One process copies while the others wait; what a killed process has downloaded is kept. For the
    address of a single object, its file is returned.
    """
    with contextlib.closing(Prefix(root)) as prefix:
        prefix.check()  # an address that is wrong from the start is not tried again
        # The same address at another endpoint is another bucket.
        identity = f"{prefix.client.meta.endpoint_url}\0{prefix.bucket}\0{prefix.prefix}"
        home = cache_folder(cache_dir, "s3", f"{prefix.bucket}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}")
        remedy = "free some space, or give another data.cache_dir"
        with locked(home / "lock"), disk_trouble("data.cache_dir", home, remedy):
            for wait in _WAITS_SECONDS:
                try:
                    return _copy(prefix, home)
                except TransientError as error:
                    LOG.warning("%s; trying again in %.0f s", error, wait)
                time.sleep(wait)
            return _copy(prefix, home)


def _copy(prefix: "Prefix", home: Path) -> Path:
    listing = prefix.objects()
    wanted = set(listing)
    complete = home / hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:24]
    folder = complete if complete.is_dir() else home / "new.part"
    if wanted != (present := _objects_in(folder)):
        missing = wanted - present
        _remove_others(folder, {item.name for item in wanted & present})
        for above in {folder, *((folder / item.name).parent for item in missing)}:
            above.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _LISTING, json.dumps(listing))
        for other in home.iterdir():
            for item in missing & _objects_in(other):
                with contextlib.suppress(OSError):  # not every file system has hard links
                    os.link(other / item.name, folder / item.name)
        prefix.download(sorted(missing - _objects_in(folder)), folder)
    if folder != complete:
        if prefix.objects() != listing or wanted != _objects_in(folder):
            raise TransientError("data.root", prefix.root, *_CHANGING)
        os.sync()
        folder.rename(complete)
    return complete / prefix.only_object if prefix.only_object else complete


def _objects_in(folder: Path) -> set[RemoteObject]:
    """The objects that a copy, complete or not, has whole: downloads are renamed when they end."""
    try:
        listing = [RemoteObject(*entry) for entry in json.loads((folder / _LISTING).read_bytes())]
    except (OSError, ValueError, TypeError):
        return set()
    paths = {item: folder / item.name for item in listing}
    return {item for item, path in paths.items() if path.is_file() and path.stat().st_size == item.size}


def _remove_others(folder: Path, kept: set[str]) -> None:
    """Remove all other files (other versions, unfinished downloads), and folders that are empty then."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            with contextlib.suppress(OSError):
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in kept:
            path.unlink()


class Prefix:
    """The objects below an s3:// address; `objects` sets `only_object` for the address of a single one."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.bucket, _, prefix = root.removeprefix(SCHEME).partition("/")
        self.prefix, self.only_object = prefix.strip("/"), ""
        if not self.bucket:
            raise ConfigError("data.root", root, "names no bucket", "write s3://bucket/prefix")
        try:
            import boto3
            from botocore.config import Config
        except ImportError as error:
            raise UnavailableError("data.root", root, "boto3 is not installed", "pip install boto3") from error
        settings = Config(
            connect_timeout=3,
            read_timeout=_READ_SECONDS,
            retries={"total_max_attempts": 3, "mode": "standard"},
            max_pool_connections=2 * _DOWNLOADS,  # each object is looked up before its download
        )
        with _explained(root):
            # Not the default session, which keeps the first credentials it finds.
            self.client: Any = boto3.session.Session().client("s3", config=settings)
        self.close = self.client.close

    def check(self) -> None:
        """Raise UnavailableError if there are no objects, or they cannot be listed."""
        # The second only if another name that begins alike sorts first.
        for prefix in (self.prefix, f"{self.prefix}/"):
            first = next(self._list(prefix), None)
            if first is not None and (not self.prefix or f"{first.name}/".startswith(f"{self.prefix}/")):
                return
        raise UnavailableError("data.root", self.root, *_EMPTY)

    def objects(self) -> list[RemoteObject]:
        """List the objects, sorted by name; raise UnavailableError if there are none."""
        below = f"{self.prefix}/" if self.prefix else ""
        self.only_object = ""
        # Consoles make empty objects to show as folders.
        listed = (item for item in self._list(below) if not item.name.endswith("/"))
        inside = [item._replace(name=item.name.removeprefix(below)) for item in listed]
        found = [item for item in inside if is_member(item.name)]
        if not found and self.prefix:
            # Perhaps the address is that of one object, such as a zip file.
            only = next(self._list(self.prefix), None)
            if only is not None and only.name == self.prefix:
                self.only_object = self.prefix.rpartition("/")[2]
                found = [only._replace(name=self.only_object)]
        if not found:
            raise UnavailableError("data.root", self.root, *_EMPTY)
        for item in found:
            if any(part in ("", ".", "..") for part in item.name.split("/")) or "\0" in item.name:
                reason = f"key {item.name!r} is no usable file name"
                raise UnavailableError("data.root", self.root, reason, "rename the object")
        return sorted(found)

    def download(self, items: list[RemoteObject], folder: Path) -> None:
        """Download objects into a folder, where each file appears under its name when it is complete."""
        from s3transfer.manager import TransferConfig, TransferManager

        LOG.info("copying %d objects, %.1f MB, into %s", len(items), sum(item.size for item in items) / 1e6, folder)
        above = self.prefix.removesuffix(self.only_object).rstrip("/")
        config = TransferConfig(max_request_concurrency=_DOWNLOADS)
        with _explained(self.root), TransferManager(self.client, config) as manager:
            # In batches, so that an error ends it early.
            for start in range(0, len(items), _BATCH):
                futures = [
                    manager.download(self.bucket, f"{above}/{item.name}".lstrip("/"), str(folder / item.name))
                    for item in items[start : start + _BATCH]
                ]
                for future in futures:
                    future.result()

    def _list(self, prefix: str) -> Iterator[RemoteObject]:
        with _explained(self.root):
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix):
                for entry in page.get("Contents", []):
                    yield RemoteObject(entry["Key"], entry["Size"], entry["ETag"])


@contextlib.contextmanager
def _explained(root: str) -> Iterator[None]:
    from botocore import exceptions as aws
    from s3transfer.exceptions import RetriesExceededError, S3DownloadFailedError

    def refusal(reason: str, remedy: str, *, transient: bool = False) -> UnavailableError:
        return (TransientError if transient else UnavailableError)("data.root", root, reason, remedy)

    try:
        yield
    except aws.ClientError as error:
        code, status = str(error.response["Error"]["Code"]), error.response["ResponseMetadata"]["HTTPStatusCode"]
        unknown = (f"the store refuses it: {error}", "check the address and the credentials")
        reason, remedy = _MEANINGS.get(code, unknown)
        transient = status >= 500 or status == 429 or (reason, remedy) == _CHANGING
        raise refusal(f"{reason} ({code})", remedy, transient=transient) from error
    except S3DownloadFailedError as error:
        raise refusal(*_CHANGING, transient=True) from error
    except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError) as error:
        raise refusal(f"no usable credentials ({error})", _KEY_FIX) from error
    except aws.ParamValidationError as error:
        raise refusal("is no valid bucket name", "write s3://bucket/prefix") from error
    except (aws.FlexibleChecksumError, RetriesExceededError) as error:
        raise refusal(f"objects arrive damaged ({error})", "check the store and the network", transient=True) from error
    except (aws.HTTPClientError, aws.ConnectionError) as error:
        reason = f"the store cannot be reached ({error})"
        raise refusal(reason, "check AWS_ENDPOINT_URL_S3 and the network", transient=True) from error
    except (aws.BotoCoreError, ValueError) as error:
        # A ValueError is how botocore refuses a malformed endpoint.
        raise refusal(str(error), "check the address, AWS_ENDPOINT_URL_S3 and the credentials") from error
