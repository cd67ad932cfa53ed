"""Mirroring s3:// roots from a real server, with everything that goes wrong there."""

import os
import pickle
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from tla_service.data import storage
from tla_service.data.mirror import ObjectChangedError, RemoteObject
from tla_service.data.storage import check_root, local_root
from tla_service.errors import ConfigError, UnavailableError


@pytest.fixture
def prefix(s3: Any, request: pytest.FixtureRequest) -> str:
    """A place of this test's own in the bucket, with three objects."""
    name = f"t{abs(hash(request.node.name))}"
    for key, body in (("a.bin", b"first"), ("deep/er/b.bin", b"second" * 1000), ("empty", b"")):
        s3.put(f"{name}/{key}", body)
    return name


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the objects that were downloaded."""
    names: list[str] = []
    original = storage._Bucket._download_once

    def download(self: Any, wanted: RemoteObject, part: Path) -> None:
        names.append(wanted.name)
        original(self, wanted, part)

    monkeypatch.setattr(storage._Bucket, "_download_once", download)
    return names


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mirror(prefix: str, tmp_path: Path) -> Path:
    path = local_root(f"s3://images/{prefix}", str(tmp_path / "cache"))
    assert path is not None
    return path


def test_objects_below_a_prefix_are_copied_once(s3: Any, prefix: str, tmp_path: Path, fetched: list[str]) -> None:
    s3.put(f"{prefix}-neighbour/x", b"not ours")
    s3.put(f"{prefix}/folder/", b"")
    path = mirror(prefix, tmp_path)

    assert contents(path) == {"a.bin": b"first", "deep/er/b.bin": b"second" * 1000, "empty": b""}
    assert sorted(fetched) == ["a.bin", "deep/er/b.bin", "empty"]
    fetched.clear()
    assert mirror(prefix, tmp_path) == path
    assert mirror(f"{prefix}/", tmp_path) == path
    assert fetched == []


def test_changed_objects_are_fetched_again_and_removed_ones_removed(
    s3: Any, prefix: str, tmp_path: Path, fetched: list[str]
) -> None:
    path = mirror(prefix, tmp_path)
    fetched.clear()
    s3.put(f"{prefix}/a.bin", b"FIRST")
    s3.client.delete_object(Bucket=s3.bucket, Key=f"{prefix}/deep/er/b.bin")
    mirror(prefix, tmp_path)

    assert contents(path) == {"a.bin": b"FIRST", "empty": b""}
    assert fetched == ["a.bin"]


def test_a_damaged_copy_is_fetched_again(prefix: str, tmp_path: Path, fetched: list[str]) -> None:
    path = mirror(prefix, tmp_path)
    fetched.clear()
    (path / "a.bin").write_bytes(b"fIrst")
    (path / "empty").unlink()
    mirror(prefix, tmp_path)

    assert contents(path)["a.bin"] == b"first"
    assert sorted(fetched) == ["a.bin", "empty"]


@pytest.mark.parametrize("rubbish", ["", "{", "[]", '{"a.bin": 3}', '{"a.bin": ["x", "y", "z"]}'])
def test_a_lost_manifest_costs_a_check_not_a_download(
    prefix: str, tmp_path: Path, fetched: list[str], rubbish: str
) -> None:
    path = mirror(prefix, tmp_path)
    fetched.clear()
    (path.parent / "manifest.json").write_text(rubbish)
    mirror(prefix, tmp_path)
    assert fetched == []


def test_an_object_uploaded_in_parts_has_no_md5_and_is_checked_by_its_size(
    s3: Any, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, part = f"{prefix}/parts.bin", os.urandom(5 * 2**20)
    upload = s3.client.create_multipart_upload(Bucket=s3.bucket, Key=key)["UploadId"]
    parts = []
    for number, body in ((1, part), (2, b"tail")):
        sent = s3.client.upload_part(Bucket=s3.bucket, Key=key, UploadId=upload, PartNumber=number, Body=body)
        parts.append({"PartNumber": number, "ETag": sent["ETag"]})
    s3.client.complete_multipart_upload(Bucket=s3.bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts})
    assert "-" in s3.client.head_object(Bucket=s3.bucket, Key=key)["ETag"]

    original, times = storage._chunks, []

    def cut_once(body: Any) -> Iterator[bytes]:
        content = b"".join(original(body))
        times.append(len(content))
        yield content[:-1] if len(content) > len(part) and times.count(len(content)) == 1 else content

    monkeypatch.setattr(storage, "_chunks", cut_once)
    assert (mirror(prefix, tmp_path) / "parts.bin").read_bytes() == part + b"tail"
    assert times.count(len(part) + 4) == 2


def test_a_root_may_be_a_single_object(prefix: str, tmp_path: Path) -> None:
    path = mirror(f"{prefix}/a.bin", tmp_path)
    assert path.name == "a.bin"
    assert path.read_bytes() == b"first"
    check_root(f"s3://images/{prefix}/a.bin")


def test_an_object_that_changes_during_the_copy_is_copied_as_a_whole(
    s3: Any, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = storage._Bucket.objects
    listings = []

    def objects(self: Any) -> list[RemoteObject]:
        found = original(self)
        listings.append(found)
        if len(listings) == 1:
            s3.put(f"{prefix}/a.bin", b"overwritten after the listing")
        return found

    monkeypatch.setattr(storage._Bucket, "objects", objects)
    path = mirror(prefix, tmp_path)

    assert len(listings) == 2
    assert contents(path)["a.bin"] == b"overwritten after the listing"


def test_an_object_that_keeps_changing_is_given_up(
    s3: Any, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = storage._Bucket.objects

    def objects(self: Any) -> list[RemoteObject]:
        found = original(self)
        s3.put(f"{prefix}/a.bin", os.urandom(8))
        return found

    monkeypatch.setattr(storage._Bucket, "objects", objects)
    with pytest.raises(UnavailableError, match="keep changing"):
        mirror(prefix, tmp_path)


def test_the_store_itself_refuses_another_version(s3: Any, prefix: str, tmp_path: Path) -> None:
    with storage._Bucket(f"s3://images/{prefix}") as bucket:
        (listed,) = [item for item in bucket.objects() if item.name == "a.bin"]
        s3.put(f"{prefix}/a.bin", b"later")
        with pytest.raises(ObjectChangedError) as caught:
            bucket.download(listed, tmp_path / "part")
    assert isinstance(caught.value.__cause__, ClientError)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_content_that_does_not_match_is_tried_again(
    prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    original, times = storage._chunks, []

    def chunks(body: Any) -> Any:
        content = b"".join(original(body))
        times.append(content)
        if content == b"first" and times.count(content) == 1:
            content = b"fIrst" if damage == "flip" else b"fir"
        yield content

    monkeypatch.setattr(storage, "_chunks", chunks)
    monkeypatch.setattr(storage, "_FIRST_PAUSE_SECONDS", 0.01)
    assert contents(mirror(prefix, tmp_path))["a.bin"] == b"first"
    assert times.count(b"first") == 2


def test_content_that_never_matches_is_not_used(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_chunks", lambda body: iter([body.read()[:3]]))
    monkeypatch.setattr(storage, "_FIRST_PAUSE_SECONDS", 0.01)
    with pytest.raises(UnavailableError, match="cannot be read"):
        mirror(prefix, tmp_path)
    used = {name for name in contents(tmp_path / "cache") if "/objects/" in name}
    assert {name.rpartition("/")[2] for name in used} <= {"empty"}


def test_two_processes_at_once_download_once(
    prefix: str, tmp_path: Path, fork: Callable[..., ForkProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = storage._Bucket._download_once

    def download(self: Any, wanted: RemoteObject, part: Path) -> None:
        with (tmp_path / "log").open("a") as log:
            log.write(f"{wanted.name}\n")
        # Long enough for the other process to arrive.
        time.sleep(0.5)
        original(self, wanted, part)

    def work() -> None:
        assert contents(mirror(prefix, tmp_path))["a.bin"] == b"first"

    monkeypatch.setattr(storage._Bucket, "_download_once", download)
    started = [fork(work) for _ in range(2)]
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0]
    assert sorted((tmp_path / "log").read_text().split()) == ["a.bin", "deep/er/b.bin", "empty"]


def test_a_process_killed_half_way_leaves_nothing_that_is_used(
    s3: Any, prefix: str, tmp_path: Path, fork: Callable[..., ForkProcess], fetched: list[str]
) -> None:
    body = os.urandom(300_000)
    s3.put(f"{prefix}/z.bin", body)
    original = storage._chunks

    def chunks(response: Any) -> Iterator[bytes]:
        content = b"".join(original(response))
        if content != body:
            yield content
            return
        # Half of one object, when the others are through; then it waits to be killed.
        yield content[:150_000]
        while sum(path.is_file() for path in (tmp_path / "cache").rglob("objects/**/[!.]*")) < 3:
            time.sleep(0.01)
        (tmp_path / "half").touch()
        time.sleep(60)

    def work() -> None:
        storage._chunks = chunks
        mirror(prefix, tmp_path)

    process = fork(work)
    deadline = time.monotonic() + 30
    while not (tmp_path / "half").exists():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.join()
    left = contents(tmp_path / "cache")
    assert any(name.endswith(".part") for name in left)
    assert not any(name.endswith("/z.bin") for name in left)

    path = mirror(prefix, tmp_path)
    assert contents(path)["z.bin"] == body
    assert set(contents(path)) == {"a.bin", "deep/er/b.bin", "empty", "z.bin"}
    # What was complete is recognised by its checksum.
    assert fetched == ["z.bin"]


@pytest.mark.parametrize("function", [check_root, lambda root: local_root(root, "/nonexistent/cache")])
@pytest.mark.parametrize(
    ("root", "changes", "message"),
    [
        ("s3://no-such-bucket-here/x", {}, "the bucket does not exist"),
        ("s3://images/nothing-there", {}, "no objects there"),
        ("s3://images/x", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "credentials are refused"),
        ("s3://images/x", {"AWS_ACCESS_KEY_ID": "nobody"}, "credentials are refused"),
        ("s3://images/x", {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, "no usable credentials"),
        ("s3://images/x", {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1"}, "cannot be reached"),
        ("s3://images/x", {"AWS_ENDPOINT_URL_S3": "nonsense"}, "AWS_ENDPOINT_URL_S3"),
        ("s3://Not A Bucket/x", {}, "no valid bucket name"),
    ],
)
def test_what_is_wrong_is_said_quickly(
    s3: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    root: str,
    changes: dict[str, str | None],
    message: str,
    function: Callable[[str], object],
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in changes.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    if function is not check_root:
        function = lambda address: local_root(address, str(tmp_path / "cache"))  # noqa: E731
    start = time.monotonic()
    with pytest.raises(UnavailableError, match=message) as caught:
        function(root)
    assert time.monotonic() - start < 10
    assert caught.value.subject == "data.root"
    assert caught.value.exit_code == 3
    assert root in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_silent_endpoint_is_given_up(monkeypatch: pytest.MonkeyPatch, s3: Any) -> None:
    monkeypatch.setattr(storage, "_READ_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(UnavailableError, match="cannot be reached"):
            check_root("s3://images/x")
        assert time.monotonic() - start < 15


def test_denied_objects_are_reported(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = storage._connect

    def connect(root: str) -> Any:
        client = original(root)

        def denied(**_: object) -> None:
            response = {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}
            raise ClientError(response, "GetObject")

        client.get_object = denied
        return client

    monkeypatch.setattr(storage, "_connect", connect)
    with pytest.raises(UnavailableError, match="access denied"):
        mirror(prefix, tmp_path)


@pytest.mark.parametrize("key", ["../up", "a/../../up", "/absolute", "a//b"])
def test_keys_that_lead_elsewhere_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: Any, key: str
) -> None:
    monkeypatch.setattr(storage._Bucket, "objects", lambda _: [RemoteObject(key, 1, "0" * 32)])
    with pytest.raises(UnavailableError, match="no usable file name"):
        mirror("x", tmp_path)
    assert not list(tmp_path.rglob("up"))


def test_a_good_root_passes_the_check_without_a_copy(prefix: str, tmp_path: Path) -> None:
    check_root(f"s3://images/{prefix}")
    check_root(str(tmp_path))
    check_root(None)
    assert not list(tmp_path.iterdir())


def test_local_roots_are_used_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sets").mkdir()
    assert local_root("~/sets", "unused") == tmp_path / "sets"
    assert local_root(None, "unused") is None
    assert local_root(str(tmp_path / "new"), "unused", create=True) == tmp_path / "new"
    assert (tmp_path / "new").is_dir()


@pytest.mark.parametrize("function", [check_root, lambda root: local_root(root, "unused")])
def test_roots_that_are_not_there_are_refused(function: Callable[[str], object], tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"data\.root=.*/nowhere: no such file or folder"):
        function(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"data\.root=gs://bucket/x: only local paths and s3://"):
        function("gs://bucket/x")
    with pytest.raises(ConfigError, match="names no bucket"):
        function("s3:///x")


def test_unreadable_roots_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may read everything, so the answer of the system is what is replaced.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UnavailableError, match="no permission"):
        check_root(str(tmp_path))


def test_the_package_imports_without_optional_libraries_and_says_what_is_missing(
    run_python: Callable[..., "subprocess.Popen[str]"],
) -> None:
    code = (
        "import sys\n"
        "for name in ('boto3', 'botocore', 'ray', 'mlflow', 'sklearn', 'pyarrow', 'torchvision'):\n"
        "    sys.modules[name] = None\n"
        "import tla_service.data as data\n"
        "from tla_service.errors import UnavailableError\n"
        "try: data.check_root('s3://b/x')\n"
        "except UnavailableError as error: print(error)\n"
    )
    output, errors = run_python(code).communicate(timeout=60)
    assert output == "data.root=s3://b/x: boto3 is not installed; pip install boto3\n", errors
