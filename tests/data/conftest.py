"""What the data tests share: real data sets, a real S3 server, small sets made on the spot."""

import contextlib
import fcntl
import io
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tla_service.config import DataConfig

REPOSITORY = Path(__file__).resolve().parents[2]
AWS_NAMES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "AWS_PROFILE",
)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real data sets."""
    folder = Path(os.environ.get("TLA_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real data sets: set TLA_TEST_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache that tests on the real data share, so that each set is decoded once."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """Data sections with a cache of their own."""

    def make(**fields: Any) -> DataConfig:
        return DataConfig(**{"cache_dir": str(tmp_path / "cache"), **fields})

    return make


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """An image file of (H, W) or (H, W, 3) pixels."""
    handle = io.BytesIO()
    Image.fromarray(pixels).save(handle, kind, **options)
    return handle.getvalue()


@pytest.fixture(name="encoded")
def encoded_fixture() -> Callable[..., bytes]:
    """Makes image files."""
    return encoded


@pytest.fixture
def fork() -> Iterator[Callable[..., ForkProcess]]:
    """Starts a function in a process of its own, with everything imported, and replaced, as it is here."""
    started: list[ForkProcess] = []

    def start(function: Callable[..., object], *arguments: object) -> ForkProcess:
        process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
        started.append(process)
        process.start()
        return process

    yield start
    for process in started:
        process.kill()
        process.join()
        process.close()


@pytest.fixture
def run_python() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts Python code of this repository in a process of its own."""
    started: list[subprocess.Popen[str]] = []

    def run(code: str, *arguments: str) -> "subprocess.Popen[str]":
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "error"}
        process = subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        with contextlib.suppress(OSError):
            process.kill()
        process.communicate()


@dataclass(frozen=True)
class S3Server:
    """A running store: how to reach it, and a client that bypasses the code under test."""

    environment: dict[str, str]
    bucket: str
    client: Any

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=key, Body=body)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server on free ports, for the session."""
    script = Path(os.environ.get("TLA_TEST_S3_SERVER", REPOSITORY.parent / "shared" / "tools" / "s3_server.py"))
    if not script.is_file():
        pytest.skip("S3 tests: set TLA_TEST_S3_SERVER to a script that starts a server")
    home = tmp_path_factory.mktemp("s3")
    (home / "venv").symlink_to(_installed_server(script))
    port = _free_ports(4)
    command = [sys.executable, str(script), "start", str(home), "--port", str(port), "--bucket", "images"]
    started = subprocess.run(command, capture_output=True, text=True, check=False)
    if started.returncode:
        pytest.fail(f"the S3 server did not start: {started.stderr}")
    words = [word.partition("=") for word in started.stdout.split() if "=" in word]
    environment = {name: value for name, _, value in words}
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL_S3"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name="us-east-1",
    )
    try:
        yield S3Server(environment, "images", client)
    finally:
        client.close()
        subprocess.run([sys.executable, str(script), "stop", str(home)], check=True)


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with its address and keys in this test's environment."""
    for name in AWS_NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in {**s3_server.environment, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    return s3_server


def _installed_server(script: Path) -> Path:
    """The server's virtual environment, installed once a machine: it takes 20 seconds, starting takes 4."""
    home = Path(tempfile.gettempdir()) / f"tla-service-s3-{os.getuid()}"
    home.mkdir(exist_ok=True)
    with (home / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "complete").exists():
            command = [sys.executable, str(script), "start", str(home), "--port", str(_free_ports(4))]
            started = subprocess.run(command, capture_output=True, text=True, check=False)
            subprocess.run([sys.executable, str(script), "stop", str(home)], check=False)
            if started.returncode:
                pytest.skip(f"S3 tests: the server cannot be installed: {started.stderr[-300:]}")
            (home / "complete").touch()
    return home / "venv"


def _free_ports(count: int) -> int:
    """The first of several free ports in a row."""
    for _ in range(100):
        with contextlib.ExitStack() as stack:
            first = stack.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                for offset in range(1, count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port + offset))
            except (OSError, OverflowError):
                continue
            return port
    raise RuntimeError("no free ports")
