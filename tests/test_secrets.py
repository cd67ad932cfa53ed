"""Planted secrets are in nothing that a run leaves behind, prints, or shows in the list of processes."""

import sqlite3
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import QUICK, Job
from tests.fuzz.harness import environment, run_case
from tests.jobs.test_end_to_end import EVALUATION
from tests.registry.tracking_server import TrackingServer
from tla_service.errors import ConfigError, without_credentials
from tla_service.training.__main__ import main

WORD = "hunter2"  # in every secret
KEYS = {
    "AWS_ACCESS_KEY_ID": f"AKIA{WORD}",
    "AWS_SECRET_ACCESS_KEY": f"{WORD}/aws",
    "AWS_SESSION_TOKEN": f"{WORD}-session",
    "MLFLOW_TRACKING_PASSWORD": f"{WORD}-mlflow",
    "MLFLOW_TRACKING_USERNAME": "trainer",
    "RAY_AUTH_TOKEN": f"{WORD}-ray",
}
PLANTED = (  # what a configuration may hold by mistake, in fields that are logged
    "--tracking.tags",
    f'{{"hook": "https://bot:{WORD}@hooks.example/x?token={WORD}", "store": "s3://AKIA:{WORD}@bucket/x"}}',
)


def holding(*folders: Path) -> list[str]:
    """Files below folders, and in archives in them, whose name or content has the secret word."""
    found = []
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        contents = [str(path).encode(), path.read_bytes()]
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                contents += map(archive.read, archive.namelist())
        found += [str(path)] if any(WORD.encode() in content for content in contents) else []
    return found


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.bin").write_bytes(b"\0" + WORD.encode())
    with zipfile.ZipFile(tmp_path / "a" / "y.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside", WORD * 100)
    (tmp_path / "a" / "z").write_text("nothing")
    assert {Path(name).name for name in holding(tmp_path)} == {"x.bin", "y.zip"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"http://me:{WORD}@host:5000/x", "http://host:5000/x"),
        (f"s3://AKIA:{WORD}@bucket/x and s3://AKIA:{WORD}@other", "s3://bucket/x and s3://other"),
        (f"postgresql://u@h/db?password={WORD}&sslmode=no", "postgresql://h/db?password=&sslmode=no"),
        (f"https://h/x?a=1&X-Amz-Signature={WORD}&token={WORD}", "https://h/x?a=1&X-Amz-Signature=&token="),
        (f"https://h/x?AWSAccessKeyId={WORD}", "https://h/x?AWSAccessKeyId="),
        (f"postgresql://u:{WORD}/9a=@db:5432/x", "postgresql://db:5432/x"),
        (f"s3://AKIA:abc/{WORD}+ghi@bucket/x", "s3://bucket/x"),
        (f"https://h/x?sig={WORD}&pwd={WORD}", "https://h/x?sig=&pwd="),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("http://[::1]:5000/a@b", "http://[::1]:5000/a@b"),
        (f"me:{WORD}@host:5000", "host:5000"),
        (f"at me:{WORD}@host.example", "at host.example"),
        ("models:/tla@champion", "models:/tla@champion"),
        ("image python:3.11@sha256:0f", "image python:3.11@sha256:0f"),
        ('{"time": "12:30", "name": "a@b.c"}', '{"time": "12:30", "name": "a@b.c"}'),
    ],
)
def test_credentials_are_removed_and_nothing_else(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
    assert WORD not in str(ConfigError("x", text, text, text))


@pytest.mark.parametrize(
    "arguments",
    [
        [f"--tracking.uri=http://me:{WORD}@h", "--seed=x"],
        [f"--seed=http://me:{WORD}@h"],
        ["--data.name=image_folder", "--data.image_size=8", f"--data.root=ftp://me:{WORD}@h/x"],
        ["--data.name=image_folder", "--data.image_size=8", f"--data.root=s3://AKIA:{WORD}@_/x"],
        [f"--model.pretrained=http://me:{WORD}@h/x"],
        [f"--config=http://me:{WORD}@h/x"],
        [f"--config=me:{WORD}@h.example/x"],
        [f"--nonsense=http://me:{WORD}@h"],
        ["--tracking.tags", f'{{"a": "http://me:{WORD}@h"'],
        [f"--scaling.num_workers=https://h/?token={WORD}"],
    ],
)  # fmt: skip
def test_no_error_message_has_a_secret(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for debug in ([], ["--debug"]):
        with environment(KEYS, ["--preset", "digits", *arguments, *debug], tmp_path):
            ended = run_case(main)
        assert ended.code in (2, 3)
        assert WORD not in ended.text


def test_a_local_run_leaves_no_secret(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    variables = KEYS | {"TLA_TRACKING__URI": f"http://me:{WORD}@mlflow:5000"}
    quick = ["--training.epochs=1", "--attack.num_steps=1", '--evaluation.test={"f": {"kind": "fgsm"}}']
    with environment(variables, [*QUICK, *PLANTED, *quick, "--output=run", "--log_format=json"], tmp_path):
        assert main() == 0
    assert len(list((tmp_path / "run").rglob("*"))) > 5
    assert holding(tmp_path) == []
    assert WORD not in "".join(capfd.readouterr())


class Watch(threading.Thread):
    """Looks for the secret word in the command lines of a process's descendants, again and again."""

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.process, self.seen, self.ended, self.looked = psutil.Process(process), set[str](), threading.Event(), 0

    def run(self) -> None:
        while not self.ended.wait(0.2):
            for each in psutil.process_iter(["cmdline", "ppid"]):
                line = " ".join(each.info["cmdline"] or [])
                self.looked += 1
                if WORD in line:
                    self.seen.add(line)


@pytest.fixture
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    made = TrackingServer(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.kill()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3000)
def test_a_run_on_ray_with_a_server_and_its_evaluation_leave_no_secret(
    own_server: TrackingServer, tmp_path: Path
) -> None:
    sessions = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))
    variables = KEYS | {
        "RAY_TMPDIR": str(sessions),
        "TLA_TRACKING__URI": own_server.uri.replace("://", f"://me:{WORD}@"),
        "HOME": str(tmp_path),
    }
    variables.pop("RAY_AUTH_TOKEN")
    printed = []
    evaluation = ["--model", "models:/tla-digits/1", *EVALUATION]
    for script, preset, arguments in (
        ("train_tla.py", QUICK, [*PLANTED, "--training.epochs=1", "--scaling.num_workers=1"]),
        ("evaluate_tla.py", [], evaluation),
        ("leaderboard.py", [], []),
        ("train_tla.py", QUICK, ["--data.name=image_folder", f"--data.root=s3://AKIA:{WORD}@_/x"]),
    ):
        output = tmp_path / f"output{len(printed)}"
        job = Job(tmp_path, *arguments, environment=variables, script=script, preset=preset, output=output)
        watch = Watch(job.process.pid)
        watch.start()
        printed.append(job.wait(1000))
        watch.ended.set()
        watch.join()
        own = {line for line in watch.seen if f"jobs/{script}" not in line}
        assert not own, own  # what the user typed is the user's
        assert watch.looked
        job.end()
    assert "report.html" in printed[1], printed
    assert WORD not in "".join(printed)
    assert holding(tmp_path, sessions, own_server.folder) == []
    with closing(sqlite3.connect(own_server.folder / "server.db")) as database:
        assert WORD not in "".join(database.iterdump())
