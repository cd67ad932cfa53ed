"""A version in a new virtual environment with its own requirements and nothing else, as a stranger would use it.

Takes minutes and a package index: `pytest -m slow tests/registry/test_fresh_environment.py`.
"""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.conftest import free_port
from tests.inference.files import encoded
from tests.models.test_own_code import OWN
from tests.registry.tracking_server import config_for
from tla_service.config import DataConfig
from tla_service.data import load_dataset, split_validation
from tla_service.inference.detector import Rejector
from tla_service.models import Architecture, build_model
from tla_service.registry.loading import open_package
from tla_service.registry.packaging import log_model
from tla_service.tracking.runs import open_run
from tla_service.training.rejector import fit_rejector

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif("TLA_TEST_DATA" not in os.environ, reason="needs TLA_TEST_DATA"),
]
START_SECONDS = 300
DATA = os.environ.get("TLA_TEST_DATA", "")


class Shipped(NamedTuple):
    """A registered version, its environment, and what the training process says of some test images."""

    uri: str
    python: Path
    images: np.ndarray
    expected: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Shipped:
    """A small network trained on real digits, registered, and a virtual environment for it."""
    folder = tmp_path_factory.mktemp("fresh")
    uri = f"sqlite:///{folder}/mlflow.db"
    data = {"name": "mnist", "root": f"{DATA}/mnist", "train_limit": 3000, "test_limit": 200}
    data["cache_dir"] = str(folder / "cache")
    dataset = load_dataset(DataConfig.model_validate(data))
    config = config_for(uri, data=data, model={"name": "small_cnn"}, attack={"epsilon": 0.1, "step_size": 0.02})
    network = build_model("small_cnn", 10, (1, 28, 28)).train()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    train, validation = split_validation(dataset.train.labels, 0.1, 0)
    for _ in range(5):
        for rows in torch.split(train[torch.randperm(len(train))], 64):
            optimizer.zero_grad()
            output = network(dataset.train.fetch(rows).float() / 255)
            cross_entropy(output.logits, dataset.train.labels[rows]).backward()
            optimizer.step()
    network.eval()
    arrays = fit_rejector(network, (dataset.train, train), (dataset.train, validation), config, torch.device("cpu"))
    images = dataset.test.fetch(torch.arange(200)).numpy()
    with torch.inference_mode():
        output = network(torch.from_numpy(images).float() / 255)
    rejector = Rejector.from_arrays(arrays)
    score = rejector.detector.log_densities(output.embeddings.numpy()).max(1)
    expected = {
        "label": output.logits.argmax(1).numpy(),
        "probabilities": torch.softmax(output.logits, 1).numpy(),
        "detection_score": score,
        "accepted": score >= rejector.threshold,
        "embedding": output.embeddings.numpy(),
    }
    assert (expected["label"] == dataset.test.labels.numpy()).mean() > 0.85
    model_uri = log_model(
        uri,
        open_run(config, "fresh", facts={"data_fingerprint": dataset.fingerprint}),
        state_dict=network.state_dict(),
        config=config,
        class_names=dataset.class_names,
        image_shape=(1, 28, 28),
        example=images[:4].astype(np.float32) / 255,
        metrics={},
        registered_model="tla-mnist",
        facts={"data_fingerprint": dataset.fingerprint},
        rejector=rejector,
    )
    requirements = open_package(model_uri, uri)[0].parent / "requirements.txt"
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    install = [uv, "pip", "install", "-q", "--python", str(python), "-r", str(requirements)]
    subprocess.run(install, check=True, cwd=folder)
    return Shipped(uri, python, images, expected)


def variables(shipped: Shipped) -> dict[str, str]:
    """Nothing of this project or its environment, and no pickle."""
    return {
        "PATH": f"{shipped.python.parent}:/usr/bin:/bin",
        "HOME": str(shipped.python.parents[2]),
        "MLFLOW_TRACKING_URI": shipped.uri,
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "OMP_NUM_THREADS": "1",
    }


def agree(found: dict[str, Any], expected: dict[str, np.ndarray]) -> None:
    assert np.array(found["label"]).tolist() == expected["label"].tolist()
    assert np.array(found["accepted"]).tolist() == expected["accepted"].tolist()
    np.testing.assert_allclose(found["probabilities"], expected["probabilities"], atol=1e-5)
    np.testing.assert_allclose(found["detection_score"], expected["detection_score"], rtol=1e-5)


def test_a_new_environment_predicts_what_the_training_process_does(shipped: Shipped, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", shipped.images)
    pngs = [base64.b64encode(encoded(image)).decode() for image in shipped.images]
    (tmp_path / "pngs.json").write_text(json.dumps(pngs))
    code = (
        "import base64, importlib.util, json, mlflow, numpy as np\n"
        "assert importlib.util.find_spec('tla_service') is None and importlib.util.find_spec('ray') is None\n"
        "model = mlflow.pyfunc.load_model('models:/tla-mnist/1')\n"
        "images = np.load('images.npy')\n"
        "pngs = [base64.b64decode(text) for text in json.load(open('pngs.json'))]\n"
        "answers = [model.predict(sent, params={'embedding': True})\n"
        "           for sent in (images, images.astype(np.float32) / 255, pngs)]\n"
        "print(json.dumps([{name: values.tolist() for name, values in answer.items()} for answer in answers]))\n"
    )
    done = subprocess.run(
        [shipped.python, "-c", code],
        cwd=tmp_path,
        env=variables(shipped),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for answer in json.loads(done.stdout.splitlines()[-1]):
        agree(answer, shipped.expected)
        np.testing.assert_allclose(answer["embedding"], shipped.expected["embedding"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("registered", "model"),
    [
        ("tla-own", {"name": "network:build", "code": str(OWN), "embedding": "blocks"}),
        ("tla-timm", {"name": "timm:resnet10t"}),
    ],
)
def test_a_new_environment_builds_the_network_of_others(
    shipped: Shipped, tmp_path: Path, registered: str, model: dict[str, str]
) -> None:
    """The user's code is in the version, timm among its requirements; all others are installed already."""
    config = config_for(shipped.uri, model=model)
    network = Architecture.of(config.model).build(10, (1, 28, 28)).eval()
    uri = log_model(
        shipped.uri,
        open_run(config, registered, facts={}),
        state_dict=network.state_dict(),
        config=config,
        class_names=[str(digit) for digit in range(10)],
        image_shape=(1, 28, 28),
        example=shipped.images[:4].astype(np.float32) / 255,
        metrics={},
        registered_model=registered,
        facts={},
    )
    own, others = (
        open_package(each, shipped.uri)[0].parent / "requirements.txt" for each in (uri, "models:/tla-mnist/1")
    )
    more = sorted(set(own.read_text().split()) - set(others.read_text().split()))
    assert [line.partition("==")[0] for line in more] == (["timm"] if registered == "tla-timm" else [])
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "pip", "install", "-q", "--python", str(shipped.python), "-r", str(own)], check=True)
    np.save(tmp_path / "images.npy", shipped.images)
    code = (
        "import importlib.util, json, mlflow, numpy as np\n"
        "assert importlib.util.find_spec('tla_service') is None\n"
        f"model = mlflow.pyfunc.load_model('models:/{registered}/1')\n"
        "answer = model.predict(np.load('images.npy'), params={'embedding': True})\n"
        "print(json.dumps({name: values.tolist() for name, values in answer.items()}))\n"
    )
    done = subprocess.run(
        [shipped.python, "-c", code], cwd=tmp_path, env=variables(shipped), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    with torch.inference_mode():
        expected = network(torch.from_numpy(shipped.images).float() / 255)
    assert answer["label"] == expected.logits.argmax(1).tolist()
    np.testing.assert_allclose(answer["embedding"], expected.embeddings.numpy(), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def address(shipped: Shipped, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`mlflow models serve` in that environment."""
    folder = tmp_path_factory.mktemp("serve")
    command = [shipped.python.with_name("mlflow"), "models", "serve", "-m", "models:/tla-mnist/1"]
    command += ["--env-manager", "local", "--port", str(port := free_port()), "--workers", "1"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=variables(shipped), stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                break
        except OSError:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.5)
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def post(address: str, body: object) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/invocations", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_it_is_served_over_http(shipped: Shipped, address: str) -> None:
    fractions = (shipped.images.astype(np.float32) / 255).tolist()
    pngs = [base64.b64encode(encoded(image)).decode() for image in shipped.images]
    for sent in (fractions, shipped.images.tolist(), pngs):
        status, answer = post(address, {"inputs": sent})
        assert status == 200, answer
        agree(answer["predictions"], shipped.expected)
    status, answer = post(address, {"inputs": pngs, "params": {"embedding": True}})
    np.testing.assert_allclose(answer["predictions"]["embedding"], shipped.expected["embedding"], atol=1e-5, rtol=1e-5)


def test_bad_requests_are_explained_and_the_server_stays_up(shipped: Shipped, address: str) -> None:
    one = shipped.images[:1]
    jpeg = encoded(np.random.default_rng(0).integers(0, 256, (1, 28, 28), dtype=np.uint8), "JPEG")
    bad: list[tuple[Any, str]] = [
        ((one[:, :, :14] / 255).tolist(), "images have shape (1, 1, 14, 28); send (N, 1, 28, 28)"),
        ((one / 255 * np.nan).tolist(), "hold NaN"),
        ((one / 255 + 1).tolist(), "range over [1, "),
        ([], "there are no images"),
        ([base64.b64encode(jpeg[: len(jpeg) // 2]).decode()], "image 0 is damaged"),
        (["AAAA"] * 20_000, "there are 20000 images; send at most 10000"),
        (np.full((20, 1, 28, 28), 0.5).tolist() * 1000, "there are 20000 images; send at most 10000"),
        ("nonsense", "image 0 is "),
    ]
    for sent, message in bad:
        status, answer = post(address, {"inputs": sent})
        assert status == 400, answer
        assert message in answer["message"]
        assert len(answer["message"]) < 300
    assert post(address, b"{")[0] == 400
    assert post(address, {"nothing": 1})[0] == 400
    status, answer = post(address, {"inputs": shipped.images.tolist()})
    assert status == 200
    agree(answer["predictions"], shipped.expected)
