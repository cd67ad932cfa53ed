"""A local or s3:// root to a verified local copy, once a node. The only place that imports boto3, and only when needed.

Endpoint and credentials come from the usual AWS environment variables, profiles and roles.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tla_service.config import DataConfig
from tla_service.data.cache import cache_folder, disk_trouble
from tla_service.data.members import is_member
from tla_service.data.mirror import PARALLEL_DOWNLOADS, ObjectChangedError, RemoteObject, mirror
from tla_service.errors import ConfigError, UnavailableError

_SCHEME = "s3://"
_CONNECT_SECONDS, _READ_SECONDS, _REQUEST_ATTEMPTS = 3, 20, 3
_DOWNLOAD_ATTEMPTS, _FIRST_PAUSE_SECONDS = 6, 0.5
_CHUNK_BYTES = 2**20
_GONE = frozenset({"PreconditionFailed", "412", "NoSuchKey", "404"})
_KEY_FIX = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the role"
_MEANINGS = {
    "NoSuchBucket": ("the bucket does not exist", "check the name and AWS_ENDPOINT_URL_S3"),
    "AccessDenied": ("access denied", "allow these credentials to list the bucket and read its objects"),
    "403": ("access denied", "allow these credentials to list the bucket and read its objects"),
    "InvalidAccessKeyId": ("the credentials are refused", _KEY_FIX),
    "SignatureDoesNotMatch": ("the credentials are refused", _KEY_FIX),
    "InvalidToken": ("the credentials are refused", _KEY_FIX),
    "ExpiredToken": ("the credentials have expired", "renew them"),
    "PermanentRedirect": ("the bucket is in another region", "set AWS_DEFAULT_REGION"),
    "AuthorizationHeaderMalformed": ("the bucket is in another region", "set AWS_DEFAULT_REGION"),
}


def check_root(root: str | None) -> None:
    """Check within seconds that a root is there and can be read, without copying anything.

    Args:
        root: Local path, s3://bucket/prefix, or ``None`` (nothing to check).

    Raises:
        ConfigError: If it is no address this can read.
        UnavailableError: If it is not there, or not readable.
    """
    if root is None:
        return
    if not root.startswith(_SCHEME):
        _local(root, create=False)
        return
    with _Bucket(root) as bucket:
        bucket.first()


def local_root(root: str | None, cache_dir: str, *, create: bool = False) -> Path | None:
    """Turn a root into a local path; copy an s3:// one into the cache, or bring the copy up to date.

    Args:
        root: Local path, s3://bucket/prefix (all objects below it, or the one object of that name), or ``None``.
        cache_dir: Where copies are kept, per node.
        create: Whether to make a missing local folder instead of refusing it.

    Returns:
        The path; ``None`` for no root.

    Raises:
        ConfigError: If it is no address this can read.
        UnavailableError: If it is not there or not readable, or the cache cannot be written.
    """
    if root is None:
        return None
    if not root.startswith(_SCHEME):
        return _local(root, create=create)
    with _Bucket(root) as bucket:
        # The same address at another endpoint is another bucket.
        identity = f"{bucket.client.meta.endpoint_url}\0{bucket.name}\0{bucket.prefix}"
        home = cache_folder(cache_dir, "s3", f"{bucket.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}")
        folder = mirror(bucket, home, root)
        return folder / bucket.only_object if bucket.only_object else folder


def required_root(config: DataConfig) -> Path:
    """The local path of ``data.root``, for data sets that need one.

    Raises:
        ConfigError: If none is given.
        UnavailableError: As ``local_root``.
    """
    path = local_root(config.root, config.cache_dir, create=config.download)
    if path is None:
        raise ConfigError("data.root", None, f"{config.name} is not embedded", "give a folder, or s3://bucket/prefix")
    return path


def _local(root: str, *, create: bool) -> Path:
    if "://" in root:
        raise ConfigError("data.root", root, "only local paths and s3:// can be read", "copy the data to one of them")
    try:
        path = Path(root).expanduser()
    except RuntimeError as error:
        raise UnavailableError("data.root", root, "no home folder", "give an absolute path") from error
    with disk_trouble("data.root", root, "check the path and its permissions"):
        if create:
            path.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            remedy = "check the path; on a cluster, on every node"
            raise UnavailableError("data.root", root, "no such file or folder", remedy)
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise UnavailableError("data.root", root, "no permission", "let this user read it")
    return path


class _Bucket:
    """The objects below an s3:// address; a ``RemoteStore`` and a context manager."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.name, _, prefix = root.removeprefix(_SCHEME).partition("/")
        self.prefix = prefix.strip("/")
        self.only_object = ""
        if not self.name:
            raise ConfigError("data.root", root, "names no bucket", "write s3://bucket/prefix")
        self.client = _connect(root)

    def __enter__(self) -> "_Bucket":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def objects(self) -> list[RemoteObject]:
        """See ``RemoteStore``."""
        below = f"{self.prefix}/" if self.prefix else ""
        self.only_object = ""
        found = [
            RemoteObject(entry["Key"].removeprefix(below), entry["Size"], entry["ETag"].strip('"'))
            for entry in self._list(below)
            # Consoles make empty objects to show as folders.
            if not entry["Key"].endswith("/") and is_member(entry["Key"].removeprefix(below))
        ]
        if not found and self.prefix:
            # No folder: perhaps the address is that of one object, such as a zip file.
            entry = next(self._list(self.prefix), None)
            if entry is not None and entry["Key"] == self.prefix:
                self.only_object = self.prefix.rpartition("/")[2]
                found = [RemoteObject(self.only_object, entry["Size"], entry["ETag"].strip('"'))]
        if not found:
            raise self._empty()
        return found

    def first(self) -> None:
        """Check that there is anything.

        Raises:
            UnavailableError: If not.
        """
        # The second only if another name that begins alike sorts first.
        for prefix in (self.prefix, f"{self.prefix}/"):
            entry = next(self._list(prefix), None)
            if entry is not None and (not self.prefix or f"{entry['Key']}/".startswith(f"{self.prefix}/")):
                return
        raise self._empty()

    def _empty(self) -> UnavailableError:
        return UnavailableError("data.root", self.root, "no objects there", "check the prefix")

    def _list(self, prefix: str) -> Iterator[Any]:
        with _explained(self.root):
            for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix):
                yield from page.get("Contents", [])

    def download(self, wanted: RemoteObject, part: Path) -> None:
        """See ``RemoteStore``; a connection that breaks is tried again for about 15 seconds."""
        pause = _FIRST_PAUSE_SECONDS
        for attempt in range(_DOWNLOAD_ATTEMPTS):
            try:
                self._download_once(wanted, part)
                break
            except _BrokenError as error:
                if attempt == _DOWNLOAD_ATTEMPTS - 1:
                    reason = f"{wanted.name} cannot be read ({error})"
                    raise UnavailableError("data.root", self.root, reason, "check the store and the network") from error
            time.sleep(pause)
            pause *= 2

    def _download_once(self, wanted: RemoteObject, part: Path) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        key = self.prefix if self.only_object else "/".join(filter(None, (self.prefix, wanted.name)))
        try:
            # The store itself refuses to send another version than the one listed.
            response = self.client.get_object(Bucket=self.name, Key=key, IfMatch=f'"{wanted.etag}"')
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code in _GONE or status in (404, 412):
                raise ObjectChangedError(wanted.name) from error
            if status >= 500 or status == 429:
                raise _BrokenError(str(error)) from error
            raise _explanation(self.root, error) from error
        except BotoCoreError as error:
            raise _BrokenError(str(error)) from error
        digest, size = hashlib.md5(usedforsecurity=False), 0
        with part.open("wb") as handle:
            for chunk in _chunks(response["Body"]):
                handle.write(chunk)
                digest.update(chunk)
                size += len(chunk)
        # Where the store encrypts with keys of its own the ETag only looks like an MD5.
        plain = response.get("ServerSideEncryption", "AES256") == "AES256" and "SSECustomerAlgorithm" not in response
        if response["ETag"].strip('"') != wanted.etag:
            raise ObjectChangedError(wanted.name)
        if size != wanted.size:
            raise _BrokenError(f"{size} bytes instead of {wanted.size}")
        if plain and wanted.md5 is not None and digest.hexdigest() != wanted.md5:
            raise _BrokenError("its content does not match its checksum")


class _BrokenError(Exception):
    """A request failed in a way that may pass."""


def _chunks(body: Any) -> Iterator[bytes]:
    from botocore.exceptions import BotoCoreError
    from urllib3.exceptions import HTTPError

    with contextlib.closing(body):
        chunks = body.iter_chunks(_CHUNK_BYTES)
        while True:
            try:
                chunk = next(chunks, None)
            except (BotoCoreError, HTTPError, OSError) as error:
                raise _BrokenError(str(error)) from error
            if chunk is None:
                return
            yield chunk


def _connect(root: str) -> Any:
    try:
        import boto3
        from botocore.config import Config
    except ImportError as error:
        raise UnavailableError("data.root", root, "boto3 is not installed", "pip install boto3") from error
    settings = Config(
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_READ_SECONDS,
        retries={"total_max_attempts": _REQUEST_ATTEMPTS, "mode": "standard"},
        max_pool_connections=PARALLEL_DOWNLOADS,
    )
    with _explained(root):
        # Not the default session: it would keep the credentials that it found first.
        return boto3.session.Session().client("s3", config=settings)


@contextlib.contextmanager
def _explained(root: str) -> Iterator[None]:
    """Turn boto3's errors into messages."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise _explanation(root, error) from error
    except ValueError as error:
        # How botocore refuses a malformed endpoint.
        raise UnavailableError("data.root", root, str(error), "check AWS_ENDPOINT_URL_S3") from error


def _explanation(root: str, error: Exception) -> UnavailableError:
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        code = str(error.response.get("Error", {}).get("Code", ""))
        unknown = (f"the store refuses it: {error}", "check the address and the credentials")
        reason, remedy = _MEANINGS.get(code, unknown)
        return UnavailableError("data.root", root, f"{reason} ({code})", remedy)
    keys = exceptions.NoCredentialsError | exceptions.PartialCredentialsError | exceptions.CredentialRetrievalError
    if isinstance(error, keys):
        return UnavailableError("data.root", root, f"no usable credentials ({error})", _KEY_FIX)
    if isinstance(error, exceptions.ParamValidationError):
        return UnavailableError("data.root", root, "is no valid bucket name", "write s3://bucket/prefix")
    if isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError):
        reason = f"the store cannot be reached ({error})"
        return UnavailableError("data.root", root, reason, "check AWS_ENDPOINT_URL_S3 and the network")
    return UnavailableError("data.root", root, str(error), "check the address and the credentials")
