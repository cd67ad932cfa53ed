"""Copies of s3:// prefixes from a real server, behind a proxy that breaks connections."""

import http.client
import http.server
import json
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tla_service.data import roots
from tla_service.data.roots import Prefix, RemoteObject, check_root, copy_prefix
from tla_service.errors import UnavailableError


@pytest.fixture
def prefix(s3: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A prefix of this test's own in the bucket, with three objects; what fails is tried again at once."""
    monkeypatch.setattr(roots, "_WAITS_SECONDS", (0.05,) * 4)
    name = f"t{abs(hash(request.node.name))}"
    for key, body in (("a.bin", b"first"), ("deep/er/b.bin", b"second" * 1000), ("empty", b"")):
        s3.put(f"{name}/{key}", body)
    return name


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the objects that were downloaded."""
    names: list[str] = []
    original = Prefix.download

    def download(self: Prefix, items: list[RemoteObject], folder: Path) -> None:
        names.extend(item.name for item in items)
        original(self, items, folder)

    monkeypatch.setattr(Prefix, "download", download)
    return names


class Proxy(http.server.ThreadingHTTPServer):
    """Passes requests on to the S3 server, and the part of each answer's body that `allowed` lets through."""

    daemon_threads = True

    def __init__(self, target: str, allowed: Callable[[str, bytes], bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Forward)
        self.target, self.allowed = urlsplit(target).netloc, allowed

    def handle_error(self, *_: object) -> None:
        """A client that was killed is no failure of the test."""


class Forward(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_GET(self) -> None:
        upstream = http.client.HTTPConnection(self.server.target)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            upstream.putheader(name, value)
        upstream.endheaders()
        response = upstream.getresponse()
        body = response.read()
        upstream.close()
        passed = self.server.allowed(self.path, body)
        self.send_response_only(response.status)
        for name, value in response.getheaders():
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(passed)
        self.close_connection = len(passed) < len(body)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing: the terminal is for failures."""


@pytest.fixture
def proxy(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with Proxy(s3.environment["AWS_ENDPOINT_URL_S3"], lambda _path, body: body) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_address[1]}")
        yield server
        server.shutdown()
        thread.join()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


def copy(prefix: str, tmp_path: Path) -> Path:
    return copy_prefix(f"s3://images/{prefix}", str(tmp_path / "cache"))


def complete(tmp_path: Path) -> list[Path]:
    return [path for path in (tmp_path / "cache" / "s3").glob("*/*") if path.is_dir() and path.suffix != ".part"]


def test_objects_below_a_prefix_are_copied_once(s3: Any, prefix: str, tmp_path: Path, fetched: list[str]) -> None:
    s3.put(f"{prefix}-neighbour/x", b"not ours")
    s3.put(f"{prefix}/folder/", b"")
    path = copy(prefix, tmp_path)

    assert contents(path) == {"a.bin": b"first", "deep/er/b.bin": b"second" * 1000, "empty": b""}
    assert sorted(fetched) == ["a.bin", "deep/er/b.bin", "empty"]
    fetched.clear()
    assert copy(prefix, tmp_path) == path
    assert copy(f"{prefix}/", tmp_path) == path
    assert fetched == []


def test_a_changed_prefix_is_a_new_copy_that_fetches_only_what_changed(
    s3: Any, prefix: str, tmp_path: Path, fetched: list[str]
) -> None:
    before = copy(prefix, tmp_path)
    fetched.clear()
    s3.put(f"{prefix}/a.bin", b"FIRST")
    s3.client.delete_object(Bucket=s3.bucket, Key=f"{prefix}/empty")
    after = copy(prefix, tmp_path)

    assert contents(after) == {"a.bin": b"FIRST", "deep/er/b.bin": b"second" * 1000}
    assert fetched == ["a.bin"]
    # A run that reads the copy of before is not disturbed.
    assert contents(before) == {"a.bin": b"first", "deep/er/b.bin": b"second" * 1000, "empty": b""}


def test_without_hard_links_everything_is_fetched(
    s3: Any, prefix: str, tmp_path: Path, fetched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    copy(prefix, tmp_path)
    fetched.clear()
    s3.put(f"{prefix}/a.bin", b"FIRST")
    assert contents(copy(prefix, tmp_path))["a.bin"] == b"FIRST"
    assert sorted(fetched) == ["a.bin", "deep/er/b.bin", "empty"]


def test_a_damaged_copy_is_fetched_again(prefix: str, tmp_path: Path, fetched: list[str]) -> None:
    path = copy(prefix, tmp_path)
    fetched.clear()
    (path / "a.bin").write_bytes(b"fi")
    (path / "empty").unlink()
    assert copy(prefix, tmp_path) == path

    assert contents(path)["a.bin"] == b"first"
    assert sorted(fetched) == ["a.bin", "empty"]


def test_a_lost_listing_costs_a_download(prefix: str, tmp_path: Path, fetched: list[str]) -> None:
    path = copy(prefix, tmp_path)
    for rubbish in ("", "{", "[3]", '{"a.bin": 3}', '[["a.bin"]]'):
        (path / ".listing.json").write_text(rubbish)
        fetched.clear()
        assert contents(copy(prefix, tmp_path))["a.bin"] == b"first"
        assert len(fetched) == 3, rubbish


def test_a_file_may_become_a_folder_and_back(s3: Any, prefix: str, tmp_path: Path, proxy: Proxy) -> None:
    """Both while a copy is half done: what is in the way goes."""
    proxy.allowed = lambda path, body: body[:2] if path.endswith("/a.bin") else body
    for key in ("x", "x/y", "x"):
        s3.put(f"{prefix}/{key}", b"body")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(UnavailableError):
            patch.setattr(roots, "_WAITS_SECONDS", ())
            copy(prefix, tmp_path)
        s3.client.delete_object(Bucket=s3.bucket, Key=f"{prefix}/{key}")
    proxy.allowed = lambda _path, body: body
    assert set(contents(copy(prefix, tmp_path))) == {"a.bin", "deep/er/b.bin", "empty"}


def test_an_object_uploaded_in_parts_is_copied(s3: Any, prefix: str, tmp_path: Path) -> None:
    key, part = f"{prefix}/parts.bin", os.urandom(9 * 2**20)  # more than boto3 asks for at once
    upload = s3.client.create_multipart_upload(Bucket=s3.bucket, Key=key)["UploadId"]
    parts = []
    for number, body in ((1, part), (2, b"tail")):
        sent = s3.client.upload_part(Bucket=s3.bucket, Key=key, UploadId=upload, PartNumber=number, Body=body)
        parts.append({"PartNumber": number, "ETag": sent["ETag"]})
    s3.client.complete_multipart_upload(Bucket=s3.bucket, Key=key, UploadId=upload, MultipartUpload={"Parts": parts})
    assert "-" in s3.client.head_object(Bucket=s3.bucket, Key=key)["ETag"]
    assert (copy(prefix, tmp_path) / "parts.bin").read_bytes() == part + b"tail"


def test_a_root_may_be_a_single_object(s3: Any, prefix: str, tmp_path: Path) -> None:
    path = copy(f"{prefix}/a.bin", tmp_path)
    assert path.name == "a.bin"
    assert path.read_bytes() == b"first"
    check_root(f"s3://images/{prefix}/a.bin")
    s3.put("alone.zip", b"in the bucket itself")
    assert copy("alone.zip", tmp_path).read_bytes() == b"in the bucket itself"


def test_a_bucket_without_a_prefix_is_copied(s3: Any, tmp_path: Path) -> None:
    s3.client.create_bucket(Bucket="whole-bucket")
    s3.client.put_object(Bucket="whole-bucket", Key="deep/x", Body=b"body")
    assert contents(copy_prefix("s3://whole-bucket", str(tmp_path))) == {"deep/x": b"body"}


@pytest.mark.parametrize("change", ["overwritten", "deleted"])
def test_an_object_that_changes_during_the_copy_is_copied_as_a_whole(
    s3: Any, prefix: str, tmp_path: Path, fetched: list[str], proxy: Proxy, change: str
) -> None:
    """The object changes after the listing, and after it was read."""
    waiting = [True]

    def allowed(path: str, body: bytes) -> bytes:
        if path.endswith("/a.bin") and body and waiting:
            waiting.clear()
            if change == "deleted":
                s3.client.delete_object(Bucket=s3.bucket, Key=f"{prefix}/a.bin")
            else:
                s3.put(f"{prefix}/a.bin", b"later")
        return body

    proxy.allowed = allowed
    path = copy(prefix, tmp_path)
    kept = {"deep/er/b.bin": b"second" * 1000, "empty": b""}
    assert contents(path) == kept | ({"a.bin": b"later"} if change == "overwritten" else {})
    assert complete(tmp_path) == [path]
    assert fetched.count("deep/er/b.bin") == 1


def test_an_object_that_is_gone_after_the_listing_is_left_out(
    s3: Any, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Prefix.objects

    def objects(self: Prefix) -> list[RemoteObject]:
        found = original(self)
        s3.client.delete_object(Bucket=s3.bucket, Key=f"{prefix}/a.bin")
        return found

    monkeypatch.setattr(Prefix, "objects", objects)
    assert set(contents(copy(prefix, tmp_path))) == {"deep/er/b.bin", "empty"}


def test_an_object_that_keeps_changing_is_given_up(
    s3: Any, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Prefix.objects

    def objects(self: Prefix) -> list[RemoteObject]:
        found = original(self)
        s3.put(f"{prefix}/a.bin", os.urandom(8))
        return found

    monkeypatch.setattr(Prefix, "objects", objects)
    monkeypatch.setattr(roots, "_WAITS_SECONDS", (0.1, 0.1))
    with pytest.raises(UnavailableError, match="keep changing"):
        copy(prefix, tmp_path)
    assert complete(tmp_path) == []


@pytest.mark.parametrize(("damage", "often"), [("cut", 6), ("flipped", 1)])  # boto3 itself tries five times after a cut
def test_what_arrives_damaged_is_fetched_again(
    prefix: str, tmp_path: Path, proxy: Proxy, damage: str, often: int
) -> None:
    times = []

    def allowed(path: str, body: bytes) -> bytes:
        if path.endswith("/b.bin") and body:
            times.append(path)
            if len(times) <= often:
                return body[:2500] if damage == "cut" else b"X" + body[1:]
        return body

    proxy.allowed = allowed
    assert contents(copy(prefix, tmp_path))["deep/er/b.bin"] == b"second" * 1000
    assert len(times) == often + 1


def test_what_is_always_damaged_is_not_used(
    prefix: str, tmp_path: Path, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.allowed = lambda path, body: body[:2500] if path.endswith("/b.bin") else body
    monkeypatch.setattr(roots, "_WAITS_SECONDS", ())
    with pytest.raises(UnavailableError, match="objects arrive damaged"):
        copy(prefix, tmp_path)
    assert complete(tmp_path) == []


def test_two_processes_at_once_download_once(
    prefix: str, tmp_path: Path, fork: Callable[..., ForkProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Prefix.download

    def download(self: Prefix, items: list[RemoteObject], folder: Path) -> None:
        with (tmp_path / "log").open("a") as log:
            log.write("".join(f"{item.name}\n" for item in items))
        time.sleep(0.5)  # long enough for the other process to arrive
        original(self, items, folder)

    def work() -> None:
        assert contents(copy(prefix, tmp_path))["a.bin"] == b"first"

    monkeypatch.setattr(Prefix, "download", download)
    started = [fork(work) for _ in range(2)]
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0, 0]
    assert sorted((tmp_path / "log").read_text().split()) == ["a.bin", "deep/er/b.bin", "empty"]


def test_a_process_killed_half_way_leaves_nothing_that_is_used(
    s3: Any, prefix: str, tmp_path: Path, fork: Callable[..., ForkProcess], fetched: list[str], proxy: Proxy
) -> None:
    body = os.urandom(3_000_000)
    s3.put(f"{prefix}/z.bin", body)
    half, killed = threading.Event(), threading.Event()

    def allowed(path: str, content: bytes) -> bytes:
        if content == body and not killed.is_set():
            half.set()
            killed.wait(60)
        return content

    proxy.allowed = allowed
    process = fork(copy, prefix, tmp_path)
    assert half.wait(30)
    deadline = time.monotonic() + 30
    while len(contents(tmp_path / "cache")) < 4:  # the other three, and the lock
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.join()
    killed.set()
    assert complete(tmp_path) == []
    (unfinished,) = (tmp_path / "cache" / "s3").glob("*/new.part")
    (unfinished / "z.bin.0a1b2c3D").write_bytes(body[:1000])  # as boto3 names what it has not finished

    path = copy(prefix, tmp_path)
    assert contents(path)["z.bin"] == body
    assert set(contents(path)) == {"a.bin", "deep/er/b.bin", "empty", "z.bin"}
    assert fetched == ["z.bin"]


@pytest.mark.parametrize("function", ["check", "copy"])
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
    function: str,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in changes.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    start = time.monotonic()
    with pytest.raises(UnavailableError, match=message) as caught:
        check_root(root) if function == "check" else copy_prefix(root, str(tmp_path / "cache"))
    assert time.monotonic() - start < 10
    assert caught.value.subject == "data.root"
    assert caught.value.exit_code == 3
    assert root in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_silent_endpoint_is_given_up(monkeypatch: pytest.MonkeyPatch, s3: Any) -> None:
    monkeypatch.setattr(roots, "_READ_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(UnavailableError, match="cannot be reached"):
            check_root("s3://images/x")
        assert time.monotonic() - start < 15


def test_denied_objects_are_reported(s3: Any, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An account that may list the bucket, and read nothing in it."""
    import boto3

    iam = boto3.client("iam", endpoint_url=s3.environment["AWS_ENDPOINT_URL_S3"])
    policy = {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Action": "s3:ListBucket", "Resource": "*"}],
    }
    iam.create_user(UserName=prefix)
    iam.put_user_policy(UserName=prefix, PolicyName="list", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=prefix)["AccessKey"]
    iam.close()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
    check_root(f"s3://images/{prefix}")
    with pytest.raises(UnavailableError, match="access denied"):
        copy(prefix, tmp_path)
    assert complete(tmp_path) == []


@pytest.mark.parametrize("key", ["../up", "a/../../up", "/absolute", "a//b"])
def test_keys_that_lead_elsewhere_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str, key: str
) -> None:
    entry = RemoteObject(f"{prefix}/{key}", 1, "0")
    monkeypatch.setattr(Prefix, "_list", lambda *_: iter([entry]))
    with pytest.raises(UnavailableError, match="no usable file name"):
        copy(prefix, tmp_path)
    assert not list(tmp_path.rglob("up"))
