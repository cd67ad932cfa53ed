"""A run's folder in the storage: its checkpoints, and the record of the newest."""

import json
import pickle
import re
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

from tests.cluster.gate import Gate, gate_to
from tests.conftest import S3Server
from tla_service import errors as errors_module
from tla_service.cluster import storage as storage_module
from tla_service.cluster.storage import Folder, RunFolder, check_storage, earlier_name
from tla_service.config import RunConfig
from tla_service.config.loading import to_yaml
from tla_service.errors import ConfigError, UnavailableError

RECORD = "latest.json"


def make_folder(tmp_path: Path, record: str | None, *checkpoints: str) -> RunFolder:
    for name in checkpoints:
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run").mkdir(exist_ok=True)
    if record is not None:
        (tmp_path / "run" / RECORD).write_text(record)
    return RunFolder(str(tmp_path), "run")


def record_of(latest: str) -> str:
    return json.dumps({"checkpoint": latest})


def test_checkpoints_are_listed_newest_first(tmp_path: Path) -> None:
    assert RunFolder(str(tmp_path), "nobody").checkpoints() == []
    folder = make_folder(tmp_path, None, "step-000000008", "step-000000016", "step-000000004", "other")
    found = [checkpoint.path for checkpoint in folder.checkpoints()]
    assert found == [str(tmp_path / "run" / f"step-{step:09d}") for step in (16, 8, 4)]


def test_a_good_record_goes_without_a_word(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, record_of("step-000000008"), "step-000000004", "step-000000008")
    assert folder.check_record() == ""
    (tmp_path / "run" / RECORD).unlink()
    assert folder.check_record() == ""


WRONG = {
    "names what is gone": (record_of("step-000000016"), "checkpoint {run}/step-000000016 is missing"),
    "cut short": (record_of("step-000000008")[:20], "the record of checkpoints, {run}/{record}, is damaged"),
    "empty": ("", "the record of checkpoints, {run}/{record}, is damaged"),
    "something else": ("[1, 2]", "the record of checkpoints, {run}/{record}, is damaged"),
    "of another version": ('{"results": []}', "the record of checkpoints, {run}/{record}, is damaged"),
}


@pytest.mark.parametrize(("record", "wrong"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_with_a_record_is_said_until_there_is_another_one(
    tmp_path: Path, record: str, wrong: str
) -> None:
    wrong = wrong.format(run=tmp_path / "run", record=RECORD)
    folder = make_folder(tmp_path, record, "step-000000004", "step-000000008")
    for _ in range(2):  # the first may be killed before it has a checkpoint
        assert folder.check_record() == f"{wrong}; falling back to {tmp_path}/run/step-000000008"


@pytest.mark.parametrize(("record", "wrong"), WRONG.values(), ids=WRONG.keys())
def test_a_record_of_checkpoints_that_are_all_gone_ends_with_3(tmp_path: Path, record: str, wrong: str) -> None:
    folder = make_folder(tmp_path, record)
    with pytest.raises(UnavailableError) as caught:
        folder.check_record()
    wrong = wrong.format(run=tmp_path / "run", record=RECORD)
    remedy = f"restore its files, or delete {tmp_path}/run to start over"
    assert str(caught.value) == f"scaling.storage={tmp_path}/run: {wrong}, and no other is left; {remedy}"
    assert (tmp_path / "run" / RECORD).read_text() == record


def test_a_folder_has_an_absolute_path_for_processes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert Folder("runs/mine").uri == Folder("runs/mine").path == f"{tmp_path}/runs/mine"
    assert Folder("~/runs").path == "/home/me/runs"


def test_a_storage_that_cannot_be_reached_is_named() -> None:
    with pytest.raises(UnavailableError, match=r"scaling\.storage=nowhere://x/run: cannot be read or written"):
        RunFolder("nowhere://x", "run")
    with pytest.raises(UnavailableError, match=r"scaling\.storage=/proc/nowhere/run: cannot be .*; check"):
        RunFolder("/proc/nowhere", "run").write("a", b"b")


def test_a_run_is_found_under_the_name_that_an_earlier_version_made(tmp_path: Path) -> None:
    storage, config, other = str(tmp_path), RunConfig(), RunConfig(seed=0, method="tla_sa")
    assert earlier_name(config, storage) == config
    for name, saved in (("digits-tla-s0-00000000", other), ("digits-tla-s0-0badcafe", config)):
        (tmp_path / name / "step-000000004").mkdir(parents=True)
        (tmp_path / name / "step-000000004" / "config.yaml").write_text(to_yaml(saved))
    assert earlier_name(config, storage).name == "digits-tla-s0-0badcafe"
    assert earlier_name(RunConfig(name="mine"), storage).name == "mine"
    (tmp_path / config.run_name).mkdir()
    assert earlier_name(config, storage) == config


# ------------------------------------------------------------------------------------------------ storage away, full


def checkpoint_in(folder: Path) -> Path:
    folder.mkdir()
    for name in ("manifest.json", "model.safetensors"):
        (folder / name).write_text(name * 1000)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def gate(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The way to the S3 server, for what reads its address in this test."""
    with gate_to(s3.environment["AWS_ENDPOINT_URL_S3"]) as gate:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", gate.address)
        yield gate


@pytest.fixture
def remote(gate: Gate, s3: S3Server) -> RunFolder:
    """A folder of a run on S3, as it arrives at a worker."""
    folder: RunFolder = pickle.loads(pickle.dumps(RunFolder(f"s3://{s3.bucket}/{uuid.uuid4().hex}", "run")))
    return folder


def test_a_storage_that_comes_back_gets_and_gives_the_checkpoint(
    gate: Gate,
    remote: RunFolder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The storage comes back while the run waits to try again."""
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: gate.open())
    monkeypatch.setattr(errors_module, "time", clock)
    checkpoint = checkpoint_in(tmp_path / "step-000000004")
    for action in (
        lambda: remote.save(checkpoint, checkpoint.name),
        lambda: [found.path for found in remote.checkpoints()] == [f"{remote.path}/{checkpoint.name}"],
        lambda: remote.checkpoint(checkpoint.name).to_directory(tmp_path / "copy"),
    ):
        gate.shut()
        caplog.clear()
        assert action() is not False
        assert re.search(r"(Writing|Listing|Reading) .*/run.* failed \(.*\); trying again in 1 s", caplog.text)
    assert content(tmp_path / "copy") == content(checkpoint)
    with remote.checkpoint(checkpoint.name).as_directory() as folder:
        assert content(Path(folder)) == content(checkpoint)
    assert remote.check_record() == ""


def test_a_storage_that_stays_away_is_named_with_the_checkpoint(
    gate: Gate, remote: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = checkpoint_in(tmp_path / "step-000000004")
    gate.shut()
    monkeypatch.setattr(storage_module, "RETRY_SECONDS", 1.5)
    away = rf"scaling\.storage=.*{remote.path}.*(AWS Error NETWORK_CONNECTION|cannot be read or written).*; bring the"
    with pytest.raises(UnavailableError, match=away):
        remote.save(checkpoint, checkpoint.name)
    with pytest.raises(UnavailableError, match=away), remote.checkpoint(checkpoint.name).as_directory():
        pass


def test_a_storage_that_refuses_is_not_asked_again(s3: S3Server, tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(UnavailableError, match=r"scaling\.storage=s3://no-such-bucket/run/step-4: writing failed"):
        RunFolder("s3://no-such-bucket", "run").save(checkpoint_in(tmp_path / "step-4"), "step-4")
    assert time.monotonic() - began < 10


def test_a_checkpoint_that_is_not_there_is_no_trouble_of_the_storage(remote: RunFolder) -> None:
    with pytest.raises(FileNotFoundError), remote.checkpoint("step-000000004").as_directory():
        pass


def test_a_local_checkpoint_is_written_whole(tmp_path: Path) -> None:
    checkpoint, folder = checkpoint_in(tmp_path / "step-000000004"), RunFolder(str(tmp_path), "run")
    folder.save(checkpoint, checkpoint.name)
    (checkpoint / "manifest.json").write_text("again")
    folder.save(checkpoint, checkpoint.name)
    assert content(tmp_path / "run" / checkpoint.name) == content(checkpoint)
    with folder.checkpoint(checkpoint.name).as_directory() as found:
        assert found == str(tmp_path / "run" / checkpoint.name)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["latest.json", checkpoint.name]


SAVE = """
import sys
from pathlib import Path
from tla_service.cluster.storage import RunFolder
from tla_service.errors import UnavailableError
for storage in sys.argv[2:]:
    try:
        RunFolder(storage, "run").save(Path(sys.argv[1]), "step-000000004")
    except UnavailableError as error:
        print(error)
    print([path.name for path in Path(storage, "run").iterdir()])
"""


def test_a_local_storage_that_is_full_or_read_only_is_named_at_once(tmp_path: Path) -> None:
    full, fixed, checkpoint = tmp_path / "full", tmp_path / "fixed", checkpoint_in(tmp_path / "step-000000004")
    full.mkdir()
    (fixed / "run").mkdir(parents=True)
    mount = f"mount -t tmpfs -o size=64k none {full} && mkdir {full}/run && head -c 50000 /dev/zero > {full}/other"
    mount += f" && mount --bind {fixed} {fixed} && mount -o remount,bind,ro {fixed}"
    python = shlex.join([sys.executable, "-c", SAVE, str(checkpoint), str(full), str(fixed)])
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", f"{mount} && exec {python}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    if "unshare" in done.stderr:
        pytest.skip("no user namespaces on this machine")
    told_full, left_full, told_fixed, left_fixed = done.stdout.splitlines()
    failed = r"/run/step-000000004: writing failed \(.*"
    assert re.match(rf"scaling\.storage={full}{failed}No space left on device\)?; free some space", told_full)
    assert re.match(rf"scaling\.storage={fixed}{failed}Read-only file system", told_fixed)
    assert (left_full, left_fixed) == ("[]", "[]")


def test_a_bucket(s3: Any) -> None:
    storage = f"s3://{s3.bucket}/some/runs"
    folder = RunFolder(storage, "run")
    assert folder.checkpoints() == []
    assert folder.check_record() == ""
    for step in (4, 8):
        s3.put(f"some/runs/run/step-{step:09d}/manifest.json", b"{}")
    s3.put("some/runs/run/step-000000008/config.yaml", to_yaml(RunConfig()).encode())
    s3.put(f"some/runs/run/{RECORD}", record_of("step-000000012").encode())
    (newest, _) = folder.checkpoints()
    with newest.as_directory() as local:
        assert sorted(path.name for path in Path(local).iterdir()) == ["config.yaml", "manifest.json"]
    run = f"{s3.bucket}/some/runs/run"
    assert folder.check_record() == f"checkpoint {run}/step-000000012 is missing; falling back to {run}/step-000000008"
    s3.put("some/runs/digits-tla-s0-0badcafe/step-000000004/config.yaml", to_yaml(RunConfig()).encode())
    assert earlier_name(RunConfig(), storage).name == "digits-tla-s0-0badcafe"


def test_storage_that_can_be_written_is_accepted(s3: S3Server, tmp_path: Path) -> None:
    check_storage(f"s3://{s3.bucket}/runs")
    check_storage(str(tmp_path / "new" / "folder"))
    assert list((tmp_path / "new" / "folder").iterdir()) == []


@pytest.mark.parametrize(
    ("bucket", "variables", "reason", "remedy"),
    [
        ("nowhere", {}, "NO_SUCH_BUCKET", "create the bucket, or correct its name"),
        ("images", {"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE"}, "INVALID_ACCESS_KEY_ID", "check AWS_ACCESS_KEY_ID"),
        (
            "images",
            {"AWS_SECRET_ACCESS_KEY": "wrong"},
            "SIGNATURE",
            "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ),
    ],
)
def test_each_cause_of_an_unusable_bucket_has_its_own_remedy(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, bucket: str, variables: dict[str, str], reason: str, remedy: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnavailableError) as caught:
        check_storage(f"s3://{bucket}/runs")
    assert reason in caught.value.reason
    assert remedy in caught.value.remedy


def test_an_endpoint_that_does_not_answer_has_its_remedy_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Arrow's own attempts, which take 6 s."""
    once = AwsStandardS3RetryStrategy(max_attempts=1)
    away = S3FileSystem(anonymous=True, endpoint_override="127.0.0.1:1", scheme="http", retry_strategy=once)
    monkeypatch.setattr(storage_module, "FileSystem", SimpleNamespace(from_uri=lambda _: (away, "images/runs")))
    with pytest.raises(UnavailableError, match=r"NETWORK_CONNECTION.*check AWS_ENDPOINT_URL_S3"):
        check_storage("s3://images/runs")


def test_storage_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^scaling\.storage=s4://a/b: no address of a storage .*; give a folder, or s3"
    ):
        check_storage("s4://a/b")
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match=r"file/runs: cannot be written \(not a directory\); give a folder that"):
        check_storage(str(tmp_path / "file" / "runs"))


def test_a_storage_that_another_node_does_not_see_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two folders play a path that is on each node's own disk."""
    monkeypatch.setattr(storage_module, "SHARED_SECONDS", 0)
    driver, worker = RunFolder(str(tmp_path / "a"), "run"), RunFolder(str(tmp_path / "b"), "run")
    token = driver.mark()
    RunFolder(str(tmp_path / "a"), "run").check_shared(token)
    for _ in range(2):
        with pytest.raises(
            UnavailableError, match=r"^scaling\.storage=.*/b/run: \S+ does not see what the driver wrote"
        ):
            worker.check_shared(token)
        worker.mark()  # of another driver
