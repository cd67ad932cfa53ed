"""What leaves this project computes the same, and asks for nothing of it when it is loaded."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import export_model as job
from tests.registry.tracking_server import Packaged, config_for, images
from tla_service.errors import ConfigError, UnavailableError
from tla_service.job import run_job
from tla_service.models import build_model
from tla_service.registry import exporting
from tla_service.registry.exporting import export_model
from tla_service.registry.loading import open_package
from tla_service.registry.packaging import log_model


def pickles(archive: Path) -> list[str]:
    """Members of a pt2 archive that are neither empty, nor text, nor a tensor's plain bytes."""
    found = []
    with zipfile.ZipFile(archive) as members:
        configs = [json.loads(members.read(name)) for name in members.namelist() if name.endswith("_config.json")]
        tensors = [tensor for config in configs for tensor in config["config"].values()]
        plain = {tensor["path_name"] for tensor in tensors if not tensor["use_pickle"]}
        for name in members.namelist():
            if name.rpartition("/")[2] in plain:
                continue
            text = members.read(name).decode(errors="replace")
            if "\N{REPLACEMENT CHARACTER}" in text or not "".join(text.split()).isprintable():
                found.append(name)
    return found


def test_a_pickle_in_an_archive_is_found(tmp_path: Path) -> None:
    """What `torch.export.save` writes of a program as it comes."""
    program = torch.export.export(torch.nn.ReLU(), (torch.rand(2),))
    torch.export.save(program, tmp_path / "model.pt2")
    (found,) = pickles(tmp_path / "model.pt2")
    assert found.endswith("/data/sample_inputs/model.pt")


def test_pt2_computes_what_the_network_does(packaged: Packaged, tmp_path: Path) -> None:
    (made,) = export_model(packaged.model.model_uri, tmp_path, ("pt2",), packaged.uri)
    assert pickles(made) == []
    loaded = torch.export.load(made).module()
    with torch.inference_mode():
        logits, embeddings = loaded(torch.from_numpy(images(9)))
    torch.testing.assert_close(logits, packaged.logits(images(9)), atol=1e-5, rtol=0)
    assert embeddings.shape == (9, 128)


@pytest.mark.slow
def test_both_formats_compute_what_the_network_does(packaged: Packaged, tmp_path: Path) -> None:
    made = export_model(packaged.model.model_uri, tmp_path / "out", ("pt2", "onnx"), packaged.uri)
    assert [path.name for path in made] == ["model.pt2", "model.onnx"]
    assert all(difference < 1e-5 for difference in made.values())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "detector.safetensors", "model.json", "model.onnx", "model.pt2", "model_card.md"
    }  # fmt: skip
    np.save(tmp_path / "images.npy", images(9))
    code = (
        "import sys; sys.path = [entry for entry in sys.path if entry]\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]\n"
        "import numpy as np, onnxruntime, torch\n"
        "images = np.load('images.npy')\n"
        "assert not [name for name in sys.modules if name.startswith('tla_service')]\n"
        "a = torch.export.load('out/model.pt2').module()(torch.from_numpy(images))[0].detach().numpy()\n"
        "b = onnxruntime.InferenceSession('out/model.onnx').run(['logits'], {'images': images})[0]\n"
        "np.save('pt2.npy', a); np.save('onnx.npy', b)\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True, timeout=120)
    for name in ("pt2", "onnx"):
        np.testing.assert_allclose(np.load(tmp_path / f"{name}.npy"), packaged.logits(images(9)), atol=1e-5)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_an_export_that_computes_something_else_is_not_left_behind(
    packaged: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    right = exporting._write_pt2

    def wrong(program: object, path: Path) -> exporting.Run:
        run = right(program, path)  # type: ignore[arg-type]
        return lambda batch: [output * factor for output in run(batch)]

    monkeypatch.setattr(exporting, "_write_pt2", wrong)
    for kept in ({}, {"model.pt2": "earlier", "model.json": "its description"}):
        for name, text in kept.items():
            (tmp_path / name).write_text(text)
        with pytest.raises(RuntimeError, match=r"model\.pt2 differs from the network"):
            export_model(packaged.model.model_uri, tmp_path, ("pt2",), packaged.uri)
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == kept


def test_a_model_is_not_exported_over_its_own_files(packaged: Packaged, tmp_path: Path) -> None:
    artifacts, _ = open_package(packaged.model.model_uri, packaged.uri)
    model = shutil.copytree(artifacts.parent, tmp_path / "model")
    own = model / artifacts.name
    before = sorted(own.iterdir())
    with pytest.raises(ConfigError, match="is the folder of the model itself; choose another --output"):
        export_model(str(model), own, ("pt2",))
    assert sorted(own.iterdir()) == before


def test_the_job(
    packaged: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["export_model.py", "--tracking.uri", packaged.uri, *arguments])
        return run_job(job.main)

    assert call() == 2
    assert call("--model", "models:/tla-digits/1", "--formats", "tflite") == 2
    capsys.readouterr()
    assert call("--model", "models:/tla-digits/9") == 3
    assert capsys.readouterr().err.startswith("error: model=models:/tla-digits/9: cannot be read")
    (tmp_path / "best.safetensors").touch()
    assert call("--model", str(tmp_path)) == 2
    assert "a checkpoint, not a packaged model" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert call("--model", "models:/tla-digits/1", "--output", str(tmp_path / "file" / "out")) == 3
    assert capsys.readouterr().err.endswith("; choose another --output\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert call("--model", "models:/tla-digits/1", "--output", "~/out", "--formats", "pt2") == 0
    assert (tmp_path / "out" / "model.pt2").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["preact_resnet_18", "wrn_32_10", "tiny_resnet20_stride1", "mnist_cnn"])
def test_the_papers_networks(local_uri: str, tmp_path: Path, name: str) -> None:
    shape = (1, 28, 28) if name == "mnist_cnn" else (3, 32, 32)
    config = config_for(local_uri, model={"name": name})
    from tla_service.tracking.runs import open_run

    torch.manual_seed(0)
    made = log_model(
        local_uri,
        open_run(config, "key", facts={}),
        state_dict=build_model(name, 10, shape).state_dict(),
        config=config,
        class_names=[str(label) for label in range(10)],
        image_shape=shape,
        example=np.random.default_rng(0).random((2, *shape), dtype=np.float32),
        metrics={},
        registered_model=None,
        facts={},
    )
    for difference in export_model(made, tmp_path / "out", ("pt2", "onnx"), local_uri).values():
        assert difference < 1e-4
    assert pickles(tmp_path / "out" / "model.pt2") == []


def test_an_export_into_a_used_folder_holds_one_model(
    packaged: Packaged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("model.onnx", "model.pt2", "detector.safetensors", "model.json", "own.txt"):
        (tmp_path / name).write_text("another model")

    def fails(*_: object) -> None:
        raise OSError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(exporting, "_write_pt2", fails)
        with pytest.raises(UnavailableError, match=r"no space.*; choose another --output"):
            export_model(packaged.model.model_uri, tmp_path, ("pt2",), packaged.uri)
    assert len(list(tmp_path.iterdir())) == 5, "nothing is deleted before there is something in its place"
    export_model(packaged.model.model_uri, tmp_path, ("pt2",), packaged.uri)
    assert json.loads((tmp_path / "model.json").read_text())["architecture"] == "digits_cnn"
    assert not (tmp_path / "model.onnx").exists()
