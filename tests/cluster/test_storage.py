"""A run's folder in the storage: Ray's record of it, and its checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest

from tla_service.cluster.storage import RunFolder, earlier_name
from tla_service.config import RunConfig
from tla_service.config_loading import to_yaml
from tla_service.errors import UnavailableError

RECORD = "checkpoint_manager_snapshot.json"


def make_folder(tmp_path: Path, record: str | None, *checkpoints: str) -> RunFolder:
    for name in checkpoints:
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run").mkdir(exist_ok=True)
    if record is not None:
        (tmp_path / "run" / RECORD).write_text(record)
    return RunFolder(str(tmp_path), "run")


def record_of(latest: str | None) -> str:
    found = None if latest is None else {"checkpoint_dir_name": latest, "metrics": {}}
    return json.dumps({"ray_version": "2.60.0", "checkpoint_results": [], "latest_checkpoint_result": found})


def test_checkpoints_are_listed_newest_first(tmp_path: Path) -> None:
    assert RunFolder(str(tmp_path), "nobody").checkpoints() == []
    folder = make_folder(tmp_path, None, "step-000000008", "step-000000016", "step-000000004", "other")
    found = [checkpoint.path for checkpoint in folder.checkpoints()]
    assert found == [str(tmp_path / "run" / f"step-{step:09d}") for step in (16, 8, 4)]


@pytest.mark.parametrize("latest", ["step-000000008", None])
def test_a_good_record_goes_without_a_word(tmp_path: Path, latest: str | None) -> None:
    folder = make_folder(tmp_path, record_of(latest), "step-000000004", "step-000000008")
    assert folder.forget_record() == ""
    assert not (tmp_path / "run" / RECORD).exists()
    assert folder.forget_record() == ""


WRONG = {
    "names what is gone": (record_of("step-000000016"), "checkpoint {run}/step-000000016 is missing"),
    "cut short": (record_of("step-000000008")[:70], "Ray's record of checkpoints, {run}/{record}, is damaged"),
    "empty": ("", "Ray's record of checkpoints, {run}/{record}, is damaged"),
    "something else": ("[1, 2]", "Ray's record of checkpoints, {run}/{record}, is damaged"),
    "of another version": ('{"results": []}', "Ray's record of checkpoints, {run}/{record}, is damaged"),
}


@pytest.mark.parametrize(("record", "wrong"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_with_a_record_is_said(tmp_path: Path, record: str, wrong: str) -> None:
    wrong = wrong.format(run=tmp_path / "run", record=RECORD)
    folder = make_folder(tmp_path, record, "step-000000004", "step-000000008")
    assert folder.forget_record() == f"{wrong}; falling back to {tmp_path}/run/step-000000008"
    assert not (tmp_path / "run" / RECORD).exists()


@pytest.mark.parametrize(("record", "wrong"), WRONG.values(), ids=WRONG.keys())
def test_a_record_of_checkpoints_that_are_all_gone_ends_with_3(tmp_path: Path, record: str, wrong: str) -> None:
    folder = make_folder(tmp_path, record)
    with pytest.raises(UnavailableError) as caught:
        folder.forget_record()
    wrong = wrong.format(run=tmp_path / "run", record=RECORD)
    remedy = f"restore its files, or delete {tmp_path}/run to start over"
    assert str(caught.value) == f"scaling.storage={tmp_path}/run: {wrong}, and no other is left; {remedy}"
    assert (tmp_path / "run" / RECORD).read_text() == record


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


def test_a_bucket(s3: Any) -> None:
    storage = f"s3://{s3.bucket}/some/runs"
    folder = RunFolder(storage, "run")
    assert folder.checkpoints() == []
    assert folder.forget_record() == ""
    for step in (4, 8):
        s3.put(f"some/runs/run/step-{step:09d}/manifest.json", b"{}")
    s3.put("some/runs/run/step-000000008/config.yaml", to_yaml(RunConfig()).encode())
    s3.put(f"some/runs/run/{RECORD}", record_of("step-000000012").encode())
    (newest, _) = folder.checkpoints()
    with newest.as_directory() as local:
        assert sorted(path.name for path in Path(local).iterdir()) == ["config.yaml", "manifest.json"]
    run = f"{s3.bucket}/some/runs/run"
    assert folder.forget_record() == f"checkpoint {run}/step-000000012 is missing; falling back to {run}/step-000000008"
    assert folder.forget_record() == ""
    s3.put("some/runs/digits-tla-s0-0badcafe/step-000000004/config.yaml", to_yaml(RunConfig()).encode())
    assert earlier_name(RunConfig(), storage).name == "digits-tla-s0-0badcafe"
