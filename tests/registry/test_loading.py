"""From every kind of address to the same network, and from a bad one to a sentence."""

import json
import py_compile
import shutil
import sys
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from pyautoattack import AutoAttack
from safetensors.torch import save_file

from tests.registry.tracking_server import Packaged, images
from tla_service.config.loading import to_yaml
from tla_service.errors import ConfigError, UnavailableError
from tla_service.models import build_model
from tla_service.registry.integrity import write_manifest
from tla_service.registry.loading import load_model, open_package
from tla_service.training.checkpoint import TrainingState, save_checkpoint


@pytest.fixture
def folder(packaged: Packaged, tmp_path: Path) -> Path:
    """A copy of the packaged model's folder."""
    artifacts, _ = open_package(packaged.model.model_uri, packaged.uri)
    return Path(shutil.copytree(artifacts.parent, tmp_path / "copy"))


def test_every_address_gives_the_network_with_gradients_to_the_input(packaged: Packaged, folder: Path) -> None:
    MlflowClient(packaged.uri).set_registered_model_alias("tla-digits", "champion", "1")
    addresses = [
        "models:/tla-digits@champion",
        "models:/tla-digits/1",
        f"models:/{packaged.model.model_id}",
        f"runs:/{packaged.run_id}/model",
        str(folder),
    ]
    for address in addresses:
        network = load_model(address, tracking=packaged.uri)
        assert not network.training
        assert all(parameter.requires_grad for parameter in network.parameters())
        batch = torch.from_numpy(images()).requires_grad_()
        logits = network(batch).logits
        torch.testing.assert_close(logits.detach(), packaged.logits(images()), rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(logits.square().sum(), batch)
        assert gradient.abs().max() > 0


def test_checkpoint_folder(packaged: Packaged, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    torch.manual_seed(1)
    network = build_model("digits_cnn", 10, (1, 8, 8)).eval()
    save_file(network.state_dict(), checkpoint / "best.safetensors")
    (checkpoint / "config.yaml").write_text(to_yaml(packaged.config))
    with pytest.raises(UnavailableError, match=r"incomplete: data\.json is missing"):
        load_model(str(checkpoint))
    (checkpoint / "data.json").write_text(json.dumps({"class_names": list("0123456789"), "image_shape": [1, 8, 8]}))
    batch = torch.from_numpy(images())
    torch.testing.assert_close(load_model(str(checkpoint))(batch).logits, network(batch).logits, rtol=0, atol=0)


def test_default_store_is_the_environments(packaged: Packaged, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", packaged.uri)
    load_model("models:/tla-digits/1")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(UnavailableError, match=r"there is no tracking store at .*mlflow\.db"):
        load_model("models:/tla-digits/1")
    assert list((tmp_path / "empty").iterdir()) == [], "asking must not make a store"


@pytest.mark.parametrize(
    ("address", "match"),
    [
        ("models:/tla-digits@nobody", "models:/tla-digits@nobody: cannot be read .*nobody"),
        ("models:/tla-digits/77", "cannot be read .*77"),
        ("models:/no-such-model/1", "cannot be read .*no-such-model"),
        ("models:/m-00000000000000000000000000000000", "cannot be read"),
        ("runs:/00000000000000000000000000000000/model", "cannot be read"),
        ("/no/such/folder", "there is no such folder"),
    ],
)
def test_nothing_there(packaged: Packaged, address: str, match: str) -> None:
    with pytest.raises(UnavailableError, match=match):
        load_model(address, tracking=packaged.uri)


def test_server_away(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """MLflow's errors contain the whole address."""
    monkeypatch.setattr("tla_service.errors.time.sleep", lambda _: None)
    with pytest.raises(UnavailableError, match=r"fetching .* failed .*; bring the server back") as caught:
        load_model("models:/tla-digits/1", tracking="http://me:hunter2@127.0.0.1:9")
    assert "http://127.0.0.1:9/" in caplog.text
    assert "hunter2" not in caplog.text + str(caught.value)


def test_address_that_cannot_be_one() -> None:
    with pytest.raises(ConfigError, match="write models:/NAME/VERSION"):
        load_model("models:tla-digits")
    with pytest.raises(ConfigError, match="names no version"):
        load_model("models:/tla-digits/latest", tracking="http://127.0.0.1:9")


@pytest.mark.parametrize(
    "file", ["artifacts/weights.safetensors", "artifacts/model.json", "pyfunc_entry.py", "MLmodel"]
)
def test_a_changed_byte_is_refused(folder: Path, file: str) -> None:
    content = bytearray((folder / file).read_bytes())
    content[-2] ^= 1
    (folder / file).write_bytes(content)
    with pytest.raises(UnavailableError, match=f"{file} was modified"):
        load_model(str(folder))


def test_a_missing_and_a_new_file_are_refused(folder: Path) -> None:
    (folder / "code" / "sitecustomize.py").write_text("")
    with pytest.raises(UnavailableError, match=r"contains a file that was not packaged \(code/sitecustomize.py\)"):
        load_model(str(folder))
    (folder / "code" / "sitecustomize.py").unlink()
    (folder / "requirements.txt").unlink()
    with pytest.raises(UnavailableError, match=r"requirements\.txt is missing"):
        load_model(str(folder))


def test_a_new_list_of_files_does_not_hide_a_change(packaged: Packaged) -> None:
    """Who can write the artifacts can write the list as well; the registry knows its digest."""
    location = MlflowClient(packaged.uri).get_model_version_download_uri("tla-digits", "1")
    stored = Path(location.removeprefix("file://"))
    (stored / "code" / "tla_service" / "errors.py").write_text("raise SystemExit")
    write_manifest(stored)
    load_model(str(stored))  # a bare folder has nobody else to ask
    for address in ("models:/tla-digits/1", f"runs:/{packaged.run_id}/model", f"models:/{packaged.model.model_id}"):
        with pytest.raises(UnavailableError, match=r"manifest\.json was modified"):
            load_model(address, tracking=packaged.uri)


def test_compiled_sources_are_tolerated_and_planted_ones_refused(folder: Path) -> None:
    """Python leaves them where MLflow loads a model in place."""
    source = folder / "code" / "tla_service" / "errors.py"
    cache = source.parent / "__pycache__" / f"errors.{sys.implementation.cache_tag}.pyc"
    py_compile.compile(str(source), cfile=str(cache))
    load_model(str(folder))
    other = folder.parent / "errors.py"
    other.write_text("print('anything')")
    py_compile.compile(str(other), cfile=str(cache))
    with pytest.raises(UnavailableError, match="was not packaged"):
        load_model(str(folder))


def test_autoattack_runs_on_a_loaded_model_as_it_is(folder: Path) -> None:
    """RobustBench's evaluation is this: a module from images in [0, 1] to logits, handed to AutoAttack."""
    bare = load_model(str(folder), logits_only=True)
    batch = torch.from_numpy(images(16))
    labels = bare(batch).argmax(1)
    adversary = AutoAttack(bare, norm="Linf", eps=0.3, version="custom", attacks=["apgd-ce"], device="cpu")
    adversary.verbose = False
    adversarial = adversary.run_standard_evaluation(batch, labels, batch_size=16)
    adversarial = adversarial[0] if isinstance(adversarial, tuple) else adversarial
    assert (adversarial - batch).abs().max() <= 0.3 + 1e-6
    assert (bare(adversarial).argmax(1) == labels).float().mean() < 1


def test_logits_alone_for_other_toolboxes(packaged: Packaged, folder: Path) -> None:
    bare = load_model(str(folder), logits_only=True)
    assert not bare.training
    torch.testing.assert_close(bare(torch.from_numpy(images())).detach(), packaged.logits(images()), rtol=0, atol=0)


def test_foreign_and_future_models_are_refused(folder: Path) -> None:
    path = folder / "artifacts" / "model.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps(description | {"format_version": 99}))
    write_manifest(folder)
    with pytest.raises(ConfigError, match="has format version 99; this installation reads 2"):
        load_model(str(folder))
    path.unlink()
    write_manifest(folder)
    with pytest.raises(UnavailableError, match=r"cannot be read \(FileNotFoundError: .*model\.json"):
        load_model(str(folder))
    (folder / "manifest.json").unlink()
    with pytest.raises(UnavailableError, match=r"no readable manifest\.json, so it was not packaged by this project"):
        load_model(str(folder))


def test_weights_of_another_network_are_refused(folder: Path) -> None:
    path = folder / "artifacts" / "model.json"
    description = json.loads(path.read_text())
    path.write_text(json.dumps(description | {"num_classes": 3}))
    write_manifest(folder)
    with pytest.raises(UnavailableError, match=r"cannot be read .*size mismatch"):
        load_model(str(folder))


def test_a_changed_byte_of_a_checkpoint_is_refused(packaged: Packaged, tmp_path: Path) -> None:
    state = TrainingState(packaged.network, torch.optim.SGD(packaged.network.parameters(), 0.1))
    state.best_weights = packaged.network.state_dict()
    facts = {"class_names": list("0123456789"), "image_shape": [1, 8, 8]}
    save_checkpoint(tmp_path / "c", state, packaged.config, facts)
    (tmp_path / "c" / "optimizer.pt").unlink()  # which is not read
    load_model(str(tmp_path / "c"))
    for name in ("best.safetensors", "config.yaml", "data.json"):
        content = (tmp_path / "c" / name).read_bytes()
        (tmp_path / "c" / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UnavailableError, match=f"the checkpoint is damaged: {name} is corrupted"):
            load_model(str(tmp_path / "c"))
        (tmp_path / "c" / name).write_bytes(content)


@pytest.mark.parametrize("content", ["[]", "{}", "[1", '{"format_version": 2}', '{"format_version": 2, "weights": 7}'])
def test_a_description_that_describes_nothing_is_refused(folder: Path, content: str) -> None:
    (folder / "artifacts" / "model.json").write_text(content)
    write_manifest(folder)
    with pytest.raises((UnavailableError, ConfigError), match=r"^model=.*: (cannot be read|has format version)"):
        load_model(str(folder))
