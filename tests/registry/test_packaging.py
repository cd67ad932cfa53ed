"""What a model version holds, and that it runs where this project is not."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

import tla_service
from tests.inference.files import encoded
from tests.models.test_own_code import OWN
from tests.registry.tracking_server import Packaged, TrackingServer, config_for, images
from tla_service.data import load_dataset
from tla_service.errors import ConfigError
from tla_service.evaluation.embedding import Embedded
from tla_service.models import Architecture
from tla_service.pickles import is_pickle
from tla_service.registry.loading import load_model, open_package


def downloaded(packaged: Packaged) -> Path:
    return open_package(packaged.model.model_uri, packaged.uri)[0].parent


def pyfunc(packaged: Packaged) -> mlflow.pyfunc.PyFuncModel:
    return mlflow.pyfunc.load_model(str(downloaded(packaged)))


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_version_is_registered_with_what_finds_it_again(packaged: Packaged) -> None:
    assert packaged.model.model_uri == "models:/tla-digits/1"
    found = MlflowClient(packaged.uri).get_model_version("tla-digits", "1")
    weights = downloaded(packaged) / "artifacts" / "weights.safetensors"
    assert found.run_id == packaged.run_id
    expected = {
        "run_key": "key-1",
        "method": "tla",
        "norm": "linf",
        "epsilon": "0.15",
        "data_fingerprint": "f00d",
        "clean_accuracy": "0.900000",
        "robust_accuracy/pgd20": "0.750000",
        "model_id": packaged.model.model_id,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    assert {name: found.tags.get(name) for name in expected} == expected
    assert MlflowClient(packaged.uri).get_logged_model(packaged.model.model_id).status == "READY"


def test_the_card_of_natural_training_claims_no_training_under_attack(packaged: Packaged) -> None:
    logged = packaged.log(None, config=config_for(packaged.uri, method="natural"))
    card = (Path(open_package(logged.model_uri, packaged.uri)[0]) / "model_card.md").read_text()
    assert "Trained without an attack; tested against perturbations of L-infinity norm" in card


def test_folder_describes_the_model_and_leaks_no_local_path(packaged: Packaged, tmp_path: Path) -> None:
    folder = downloaded(packaged)
    description = json.loads((folder / "artifacts" / "model.json").read_text())
    assert description["architecture"] == "digits_cnn"
    assert description["class_names"][3] == "digit 3"
    assert description["threat_model"] == {"norm": "linf", "epsilon": 0.15}
    card = (folder / "artifacts" / "model_card.md").read_text()
    assert "| robust_accuracy/pgd20 | 75.00% |" in card
    assert "Trained against perturbations of L-infinity norm up to 0.15" in card
    mlmodel = (folder / "MLmodel").read_text()
    assert "cloudpickle" not in mlmodel
    lines = [line for line in mlmodel.splitlines() if "artifact_path" not in line]
    assert not [line for line in lines if "/tmp" in line or str(Path(__file__).parents[2]) in line]
    requirements = (folder / "requirements.txt").read_text().split()
    assert requirements == [
        f"{name}=={version(name).split('+')[0]}"
        for name in ("mlflow", "numpy", "pillow", "safetensors", "torch", "torchvision")
    ]
    code = folder / "code" / "tla_service"
    files = {path.name for path in code.iterdir()}
    assert files == {"__init__.py", "errors.py", "inference", "models", "pickles.py", "pixels.py"}
    assert (code / "models" / "catalog.py").is_file()


def test_the_copy_of_the_package_in_a_version_says_what_it_is(packaged: Packaged) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(downloaded(packaged) / 'code')!r}); from tla_service import load_model"
    )
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=False)
    assert "tla_service.load_model: this is the copy in a version that MLflow has loaded" in done.stderr


def test_no_file_is_a_pickle_and_the_scan_would_find_one(packaged: Packaged, tmp_path: Path) -> None:
    assert not any(map(is_pickle, filter(Path.is_file, downloaded(packaged).rglob("*"))))
    for name, content in (
        ("a.txt", pickle.dumps({"a": 1}, protocol=2)),
        ("b.txt", pickle.dumps([1], protocol=5)),
        ("c.pkl", b""),
    ):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "old.txt").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    length = 640  # 0x280: a header of this length starts with the first two bytes of a pickle
    fine = json.dumps({"w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).ljust(length).encode()
    (tmp_path / "fine.safetensors").write_bytes(length.to_bytes(8, "little") + fine)
    torch.save({"w": torch.zeros(2)}, tmp_path / "d.txt")
    with zipfile.ZipFile(tmp_path / "e.txt", "w") as archive:
        archive.writestr("x/data.pkl", b"")
    (tmp_path / "fine.json").write_text("{}")
    found = sorted(path.name for path in tmp_path.iterdir() if is_pickle(path))
    assert found == ["a.txt", "b.txt", "c.pkl", "d.txt", "e.txt", "old.txt"]


def test_fresh_process_without_this_project_predicts_the_same(packaged: Packaged, tmp_path: Path) -> None:
    """As does one with a network of the user's own; each with the copy of this package that it ships."""
    np.save(tmp_path / "images.npy", images())
    config = config_for(packaged.uri, model={"name": "network:build", "code": str(OWN)})
    torch.manual_seed(1)
    own = Architecture.of(config.model).build(10, (1, 8, 8)).eval()
    logged = packaged.log("tla-own", state_dict=own.state_dict(), config=config, rejector=None)
    code = (
        "import json, sys\n"
        # An editable installation of this project must not help.
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]\n"
        f"sys.path = [entry for entry in sys.path if entry != {str(Path(__file__).parents[2])!r}]\n"
        "import importlib.util\n"
        "sys.path = [entry for entry in sys.path if not __import__('os').path.isdir(entry + '/tla_service')]\n"
        "assert importlib.util.find_spec('tla_service') is None\n"
        "import mlflow, numpy as np\n"
        f"mlflow.set_tracking_uri({packaged.uri!r})\n"
        "found = []\n"
        f"for uri in {[packaged.model.model_uri, logged.model_uri]!r}:\n"
        "    for name in [name for name in sys.modules if name.startswith('tla_service')]: del sys.modules[name]\n"
        "    model = mlflow.pyfunc.load_model(uri)\n"
        f"    out = model.predict(np.load({str(tmp_path / 'images.npy')!r}))\n"
        "    import tla_service\n"
        "    home = [tla_service.__file__, tla_service.__version__, tla_service.ConfigError.exit_code]\n"
        "    found.append([home, out['label'].tolist(), out['probabilities'].tolist()])\n"
        "print(json.dumps(found))\n"
    )
    variables = {
        "PATH": os.environ["PATH"],
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    homes = []
    for network, (home, label, probabilities) in zip(
        (packaged.network, own), json.loads(done.stdout.splitlines()[-1]), strict=True
    ):
        assert "/code/tla_service/" in home[0]
        assert home[1:] == [tla_service.__version__, 2]
        homes.append(home[0])
        expected = network(torch.from_numpy(images())).logits.softmax(1).detach().numpy()
        assert label == expected.argmax(axis=1).tolist()
        np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    assert len({*homes}) == 2


def test_prediction_does_not_depend_on_the_size_of_a_request(packaged: Packaged) -> None:
    many = images(600)
    out = pyfunc(packaged).predict(many)
    assert out["label"].dtype == np.int64
    assert out["probabilities"].dtype == np.float32
    np.testing.assert_allclose(out["probabilities"], torch.softmax(packaged.logits(many), dim=1), atol=1e-5)


def test_every_form_of_an_image_through_mlflow(packaged: Packaged) -> None:
    model = pyfunc(packaged)
    pixels = np.random.default_rng(3).integers(0, 256, (4, 1, 8, 8), dtype=np.uint8)
    expected = model.predict(pixels.astype(np.float32) / 255)
    pngs = [encoded(image) for image in pixels]
    for sent in (pixels, pngs, pd.DataFrame({"image": pngs}), pixels.tolist()):
        for name, values in model.predict(sent).items():
            np.testing.assert_array_equal(values, expected[name])


def test_a_photograph_gives_the_pixels_of_training(
    packaged: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A JPEG of another size through the decoder of training, and through the registered version."""
    for number in range(8):
        path = tmp_path / "data" / ("train", "test")[number // 4] / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (1, 30 + number, 57), np.uint8)
        path.write_bytes(encoded(pixels, "JPEG"))
    data = {
        "name": "image_folder",
        "root": str(tmp_path / "data"),
        "image_size": 8,
        "cache_dir": str(tmp_path / "cache"),
    }
    config = config_for(packaged.uri, data=data, attack={"epsilon": 0.15, "step_size": 0.05})
    trained = load_dataset(config.data).test.fetch(torch.arange(4)).numpy()
    logged = packaged.log(None, config=config)
    model = mlflow.pyfunc.load_model(str(open_package(logged.model_uri, packaged.uri)[0].parent))
    predictor = model.unwrap_python_model().predictor
    seen: list[np.ndarray] = []
    predict = predictor.predict
    monkeypatch.setattr(predictor, "predict", lambda images, **rest: seen.append(images) or predict(images, **rest))
    blobs = [path.read_bytes() for path in sorted((tmp_path / "data" / "test").rglob("*.jpg"))]
    answer = model.predict(blobs)
    np.testing.assert_array_equal(seen[0], trained)
    np.testing.assert_array_equal(answer["probabilities"], model.predict(trained)["probabilities"])
    described = model.metadata.metadata["preprocessing"]
    assert described["resize"]
    card = (Path(open_package(logged.model_uri, packaged.uri)[0]) / "model_card.md").read_text()
    assert "; ".join(described["steps"]) in card
    assert "resize to 8x8 with Pillow's BILINEAR filter" in card
    assert not pyfunc(packaged).metadata.metadata["preprocessing"]["resize"]


def test_the_verdict_is_the_detectors(packaged: Packaged) -> None:
    many = images(60)
    out = pyfunc(packaged).predict(many, params={"embedding": True})
    with torch.inference_mode():
        output = packaged.network(torch.from_numpy(many))
    np.testing.assert_allclose(out["embedding"], output.embeddings, atol=1e-5)
    seen = Embedded(output.embeddings.numpy(), output.logits.numpy(), out["label"])
    expected = packaged.rejector.detector.score(seen.embeddings, seen.predictions)
    np.testing.assert_allclose(out["detection_score"], expected, rtol=1e-5)
    assert out["accepted"].tolist() == (expected >= packaged.rejector.threshold).tolist()
    assert 0 < out["accepted"].sum() < 60
    assert set(pyfunc(packaged).predict(many)) == {"label", "probabilities", "detection_score", "accepted"}


def test_a_version_without_a_detector_leaves_its_outputs_out(packaged: Packaged) -> None:
    alone = packaged.log(registered_model=None, rejector=None)
    model = mlflow.pyfunc.load_model(str(open_package(alone.model_uri, packaged.uri)[0].parent))
    assert set(model.predict(images())) == {"label", "probabilities"}
    assert [spec.name for spec in model.metadata.signature.outputs] == ["label", "probabilities"]


def test_a_loaded_model_tells_its_classes_and_its_signature(packaged: Packaged) -> None:
    meta = pyfunc(packaged).metadata
    assert meta.metadata["class_names"][3] == "digit 3"
    assert meta.metadata["detector"]["false_rejection_rate"] == 0.5
    assert str(meta.signature.inputs) == "[Tensor('float32', (-1, 1, 8, 8))]"
    assert meta.signature.params.to_dict()[0]["name"] == "embedding"


def test_images_that_cannot_be_meant_are_refused_without_an_echo(packaged: Packaged) -> None:
    with pytest.raises(MlflowException, match="hold NaN") as caught:
        pyfunc(packaged).predict(images() * np.float32(np.nan))
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"
    caught.value.message = "Failed to predict data [all of it]"
    assert caught.value.message.startswith("images hold NaN")


def test_a_changed_detector_does_not_run(packaged: Packaged) -> None:
    folder = downloaded(packaged)
    flip_last_bit(folder / "artifacts" / "detector.safetensors")
    with pytest.raises(MlflowException, match=r"detector\.safetensors: SHA-256 differs"):
        mlflow.pyfunc.load_model(str(folder))


def test_shipped_weights_that_were_changed_do_not_run(packaged: Packaged) -> None:
    folder = downloaded(packaged)
    flip_last_bit(folder / "artifacts" / "weights.safetensors")
    with pytest.raises(MlflowException, match="SHA-256 differs"):
        mlflow.pyfunc.load_model(str(folder))


def test_same_weights_of_a_run_are_registered_once(packaged: Packaged) -> None:
    assert packaged.log() == packaged.model
    other = packaged.log(state_dict={name: tensor * 2 for name, tensor in packaged.network.state_dict().items()})
    assert other.version == "2"


def test_without_a_name_the_model_is_kept_but_not_registered(packaged: Packaged) -> None:
    alone = packaged.log(registered_model=None)
    assert (alone.model_uri, alone.version) == (f"models:/{alone.model_id}", None)
    assert len(MlflowClient(packaged.uri).search_model_versions()) == 1
    load_model(alone.model_uri, tracking=packaged.uri)


def test_weights_of_another_network_are_never_stored(packaged: Packaged) -> None:
    with pytest.raises(Exception, match="cannot be read"):
        packaged.log(state_dict={"a": torch.zeros(2)})
    with pytest.raises(ConfigError, match="outputs are not finite"):
        packaged.log(
            state_dict={name: torch.full_like(t, torch.nan) for name, t in packaged.network.state_dict().items()}
        )
    assert len(MlflowClient(packaged.uri).search_model_versions()) == 1


def test_saving_leaves_the_import_path_alone(packaged: Packaged) -> None:
    before = list(sys.path)
    packaged.log(registered_model=None)
    assert sys.path == before


def test_through_a_server(server: TrackingServer) -> None:
    packaged = Packaged(server.uri)
    assert packaged.model.model_uri == "models:/tla-digits/1"
    network = load_model(f"runs:/{packaged.run_id}/model", tracking=server.uri)
    with torch.inference_mode():
        assert torch.equal(network(torch.from_numpy(images())).logits, packaged.logits(images()))


@pytest.mark.slow
def test_a_version_keeps_the_activation_of_its_network(packaged: Packaged) -> None:
    """Weights do not tell it: they fit the network with another activation just as well."""
    torch.manual_seed(0)
    made = Architecture("preact_resnet_18", activation="silu")
    network = made.build(10, (1, 8, 8)).eval()
    config = config_for(packaged.uri, model={"name": made.name, "activation": made.activation})
    logged = packaged.log("tla-silu", config=config, state_dict=network.state_dict(), rejector=None)
    with torch.inference_mode():
        expected = network(torch.from_numpy(images())).logits
        loaded = load_model(logged.model_uri, tracking=packaged.uri)(torch.from_numpy(images())).logits
    torch.testing.assert_close(loaded, expected)
    folder, _ = open_package(logged.model_uri, packaged.uri)
    served = mlflow.pyfunc.load_model(str(folder.parent)).predict(images())
    np.testing.assert_allclose(served["probabilities"], expected.softmax(1), rtol=1e-5)
