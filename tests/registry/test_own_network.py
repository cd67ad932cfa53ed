"""Registered versions of networks from outside the package: source as plain files, requirements, and no pickle."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pytest
import torch

from tests.models.test_own_code import OWN
from tests.registry.tracking_server import Packaged, config_for, images
from tla_service.errors import UnavailableError
from tla_service.inference.predictor import Predictor
from tla_service.models import Architecture, ImageClassifier
from tla_service.pickles import is_pickle
from tla_service.registry.exporting import export_model
from tla_service.registry.loading import load_model, open_package

NAMES = ("mlflow", "numpy", "pillow", "safetensors", "torch", "torchvision")


def logged(packaged: Packaged, **model: str) -> tuple[ImageClassifier, str]:
    """A network with fresh weights, and its registered version."""
    config = config_for(packaged.uri, model=model)
    torch.manual_seed(1)
    network = Architecture.of(config.model).build(10, (1, 8, 8)).eval()
    made = packaged.log("tla-own", state_dict=network.state_dict(), config=config, rejector=None)
    return network, made.model_uri


def requirements(folder: Path) -> list[str]:
    return (folder / "requirements.txt").read_text().split()


def test_a_version_has_the_source_as_files_and_loads_without_the_folder(packaged: Packaged, tmp_path: Path) -> None:
    code = Path(shutil.copytree(OWN, tmp_path / "code"))
    (code / "requirements.txt").write_text("einops==0.8.1\nTorch<2  # the version has its own\n")
    network, uri = logged(packaged, name="network:build", code=str(code), embedding="blocks.0")
    shutil.rmtree(code)
    folder = open_package(uri, packaged.uri)[0].parent
    assert (folder / "artifacts" / "network" / "layers.py").read_text() == (OWN / "layers.py").read_text()
    assert not any(map(is_pickle, filter(Path.is_file, folder.rglob("*"))))
    pins = [f"{name}=={version(name).partition('+')[0]}" for name in NAMES]
    assert requirements(folder) == [*pins, "einops==0.8.1"]
    description = json.loads((folder / "artifacts" / "model.json").read_text())
    assert {name: description[name] for name in ("architecture", "embedding", "code")} == {
        "architecture": "network:build",
        "embedding": "blocks.0",
        "code": "network",
    }
    batch = torch.from_numpy(images(5))
    expected = network(batch)
    loaded = load_model(uri, tracking=packaged.uri)(batch)
    assert torch.equal(loaded.logits, expected.logits)
    assert torch.equal(loaded.embeddings, expected.embeddings)
    answer = Predictor.load(folder / "artifacts").predict(images(5), embedding=True)
    np.testing.assert_allclose(answer["embedding"], expected.embeddings.detach().numpy(), rtol=1e-5)
    assert (
        mlflow.pyfunc.load_model(str(folder)).predict(images(5))["label"].tolist() == expected.logits.argmax(1).tolist()
    )
    assert not list((folder / "artifacts").rglob("__pycache__"))  # beside it MLflow writes one of its entry
    for difference in export_model(uri, tmp_path / "out", ("pt2",), packaged.uri).values():
        assert difference < 1e-5


def test_changed_code_is_not_run(packaged: Packaged, tmp_path: Path) -> None:
    _, uri = logged(packaged, name="network:build", code=str(OWN))
    folder = Path(shutil.copytree(open_package(uri, packaged.uri)[0].parent, tmp_path / "copy"))
    with (folder / "artifacts" / "network" / "layers.py").open("a") as file:
        file.write("raise SystemExit('this ran')\n")
    with pytest.raises(UnavailableError, match=r"artifacts/network/layers.py was modified"):
        load_model(str(folder))


def test_a_version_of_a_timm_network_pins_timm(packaged: Packaged) -> None:
    pytest.importorskip("timm")
    network, uri = logged(packaged, name="timm:resnet10t")
    folder = open_package(uri, packaged.uri)[0].parent
    assert requirements(folder)[-1] == f"timm=={version('timm')}"
    batch = torch.from_numpy(images(5))
    assert torch.equal(load_model(uri, tracking=packaged.uri)(batch).logits, network(batch).logits)
