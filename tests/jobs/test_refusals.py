"""What a user can get wrong: the right exit code and one message each, before Ray starts or a worker is claimed."""

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.jobs.conftest import Run
from tla_service.config.loading import load_config, read_settings
from tla_service.errors import ConfigError, UnavailableError
from tla_service.registry.job_settings import PromoteSettings
from tla_service.workflows.run import check_disks

JOB = "train_tla"


def one_class_folder(folder: Path) -> str:
    for split in ("train", "test"):
        (folder / "set" / split / "cat").mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "set" / split / "cat" / f"{number}.png")
    return str(folder / "set")


WRONG_SETTINGS: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown flag": (("--loss.margn", "0.1"), "--loss.margn: no such flag; did you mean --loss.margin?"),
    "epsilon in 8-bit levels": (("--attack.epsilon", "8"), "attack.epsilon=8: outside (0, 1]; write 8/255"),
    "layer that the network lacks": (
        ("--loss.triplet_layer", "lower"),
        "loss.triplet_layer=lower: SmallCNN has no layer of this name; take embedding or logits",
    ),
    "layer without triplets": (
        ("--method", "at", "--loss.triplet_layer", "logits"),
        "loss.triplet_layer=logits: method at has no triplets; leave it out",
    ),
    "pool larger than the set": (
        ("--mining.pool", "separate", "--mining.pool_size", "5000"),
        "mining.pool_size=5000: ",
    ),
    "set that is not embedded": (("--data.name", "cifar10"), "data.root"),
    "unknown network": (("--model.name", "preact_resnet18"), "model.name=preact_resnet18: there is no such network"),
    "network too large": (("--model.name", "torchvision:inception_v3"), "model.name=torchvision:inception_v3: "),
    "registered model that MLflow refuses": (
        ("--tracking.registered_model", "team/digits"),
        "tracking.registered_model=team/digits: a registered model's name cannot contain /",
    ),
    "tag that MLflow refuses": (("--tracking.tags", '{"owner%": "x"}'), "tracking.tags=owner%: has more than"),
    "attack whose metric MLflow refuses": (
        ("--evaluation.test", '{"PGD-20, eps=8/255 (strong!)": {"kind": "fgsm"}}'),
        "evaluation.test=PGD-20, eps=8/255 (strong!): has more than",
    ),
    "one test image": (
        ("--data.test_limit", "1"),
        "data.test_limit=1: 1 test image; the input example of a packaged model",
    ),
    "a step with one image": (
        (
            *("--model.name", "torchvision:resnet18", "--training.global_batch_size", "2"),
            *("--data.train_limit", "102", "--scaling.num_workers", "1", "--method", "at"),
        ),
        "training.global_batch_size=2: 91 training images in 46 steps leave it with one image in some step",
    ),
    "storage that is none": (("--scaling.storage", "s4://a/b"), "scaling.storage=s4://a/b: no address of a storage"),
    "plain folder for tracking": (("--tracking.uri", "file:/tmp/mlruns"), "tracking.uri=file:/tmp/mlruns: "),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS.keys())
def test_a_wrong_setting_ends_with_2(run_in_process: Run, arguments: tuple[str, ...], message: str) -> None:
    code, error = run_in_process(*arguments)
    assert code == 2, error
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_several_wrong_settings_are_all_named(run_in_process: Run) -> None:
    code, error = run_in_process("--training.epochs", "0", "--loss.margin", "-1")
    assert code == 2
    assert [line.split(":")[1].split("=")[0].strip() for line in error.splitlines()] == [
        "loss.margin",
        "training.epochs",
    ]


def test_an_unknown_setting_in_a_file_ends_with_2(run_in_process: Run, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("loss: {margn: 0.1}")
    code, error = run_in_process("--config", "run.yaml")
    assert (code, error) == (2, "error: loss.margn=0.1: no such setting; did you mean margin?\n")


def test_a_misspelt_variable_ends_with_2(run_in_process: Run) -> None:
    code, error = run_in_process(TLA_LOSS_MARGIN="0.1")
    assert code == 2
    assert "TLA_LOSS_MARGIN=0.1: no such setting" in error


def test_a_single_class_ends_with_2(run_in_process: Run, tmp_path: Path) -> None:
    root = one_class_folder(tmp_path)
    code, error = run_in_process("--data.name", "image_folder", "--data.root", root, "--data.image_size", "8")
    assert code == 2, error
    assert "class" in error


def test_a_folder_with_another_run_ends_with_2_and_stays(run_in_process: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    from tla_service.config.loading import load_settings, to_yaml

    (tmp_path / "out" / "config.yaml").write_text(to_yaml(load_settings(["--loss.margin", "0.2"]).run_config))
    before = (tmp_path / "out" / "config.yaml").read_text()
    code, error = run_in_process("--output", str(tmp_path / "out"))
    assert code == 2
    assert "holds a run with another configuration" in error
    assert (tmp_path / "out" / "config.yaml").read_text() == before


def test_a_refused_run_leaves_the_folder_free_for_the_mended_one(run_in_process: Run, tmp_path: Path) -> None:
    output = str(tmp_path / "out")
    assert run_in_process("--output", output, "--model.name", "digitscnn")[0] == 2
    assert list((tmp_path / "out").iterdir()) == []
    code, error = run_in_process("--output", output, "--tracking.uri", "http://127.0.0.1:1")
    assert code == 3
    assert "no server answers" in error


MISSING: dict[str, tuple[tuple[str, ...], str]] = {
    "data": (("--data.name", "mnist", "--data.root", "/nowhere/mnist"), "data.root=/nowhere/mnist: "),
    "tracking server": (("--tracking.uri", "http://127.0.0.1:1"), "tracking.uri=http://127.0.0.1:1: no server answers"),
    "weights": (("--model.pretrained", "/nowhere/weights"), "model.pretrained=/nowhere/weights: there is no such file"),
    "registered model": (
        ("--model.pretrained", "models:/nobody@champion"),
        "model.pretrained=models:/nobody@champion: ",
    ),
    "place for checkpoints": (("--scaling.storage", "/dev/null/x"), "scaling.storage=/dev/null/x: cannot be written"),
    "cluster": (("--scaling.address", "127.0.0.1:1"), "scaling.address=127.0.0.1:1: no Ray cluster answers"),
    "place for results": (("--output", "/dev/null/out"), "output=/dev/null/out: cannot be written"),
}


@pytest.mark.parametrize(("arguments", "message"), MISSING.values(), ids=MISSING.keys())
def test_what_is_missing_ends_with_3(run_in_process: Run, arguments: tuple[str, ...], message: str) -> None:
    code, error = run_in_process(*arguments)
    assert code == 3, error
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], dict[str, Path]]:
    """A folder for each setting; the size of one's disk is pretended: a full one cannot be had without being root."""
    places = {name: tmp_path / name for name in ("output", "TMPDIR", "scaling.storage", "tracking.uri")}
    for place in places.values():
        place.mkdir()
    true = shutil.disk_usage

    def fill(disk: str) -> dict[str, Path]:
        def usage(path: Path) -> Any:
            return true(path)._replace(free=1000 if places[disk] in (path, *Path(path).parents) else 10**12)

        monkeypatch.setattr(tempfile, "tempdir", str(places["TMPDIR"]))
        monkeypatch.setattr(shutil, "disk_usage", usage)
        monkeypatch.setattr("tla_service.training.precheck._device", lambda path: hash(str(path)))
        return places

    return fill


def test_a_disk_without_room_for_checkpoints_ends_with_3(
    run_in_process: Run, full: Callable[[str], dict[str, Path]]
) -> None:
    places = full("output")
    code, error = run_in_process(
        *("--output", str(places["output"]), "--scaling.storage", str(places["scaling.storage"])),
        *("--tracking.uri", f"sqlite:///{places['tracking.uri']}/mlflow.db"),
    )
    assert code == 3, error
    assert error.startswith(f"error: output={places['output']}")
    assert "its disk has 1e-06 GB free, the run needs 0.00" in error
    assert "point output to another disk" in error


@pytest.mark.parametrize("disk", ["TMPDIR", "scaling.storage", "tracking.uri"])
def test_the_other_disks_that_take_checkpoints_are_checked(full: Callable[[str], dict[str, Path]], disk: str) -> None:
    places = full(disk)
    config = load_config("digits", tracking={"uri": f"sqlite:///{places['tracking.uri']}/mlflow.db"})
    with pytest.raises(UnavailableError, match=rf"^{disk}={places[disk]}.* point {disk} to another disk"):
        check_disks(config, places["output"], str(places["scaling.storage"]), 10**6)


def test_an_unreachable_bucket_ends_with_3(run_in_process: Run) -> None:
    arguments = ("--data.name", "mnist", "--data.root", "s3://bucket/prefix")
    keys = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "wrong"}
    code, error = run_in_process(*arguments, AWS_ENDPOINT_URL_S3="http://127.0.0.1:1", **keys)
    assert code == 3, error
    assert error.startswith("error: data.root=s3://bucket/prefix: ")


@pytest.mark.parametrize("version", ["03", "0", "\u0663", "1.0"])
def test_a_version_is_written_as_mlflow_writes_it(version: str) -> None:
    """MLflow takes 03 for 3, and a version promoted over itself would lose the one before it."""
    with pytest.raises(ConfigError, match=f"^version={re.escape(version)}: "):
        read_settings(PromoteSettings, ["--model", "x", "--version", version])
