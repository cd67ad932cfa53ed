"""The relatives of a model: which are found, and why others are not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.jobs.test_evaluate_refusals import checkpoint
from tests.report.test_main import Run, run
from tla_service.config import DataConfig, RunConfig
from tla_service.config.loading import to_yaml
from tla_service.data import load_dataset
from tla_service.evaluation.shards import load_outcome
from tla_service.models import build_model
from tla_service.report.relatives import Kin, find_relatives
from tla_service.report.schema import read_report
from tla_service.report.subjects import load_checkpoint_subject
from tla_service.training.average import WeightAverage
from tla_service.training.checkpoint import cpu_weights

__all__ = ["run"]


def configure(folder: Path, **changes: Any) -> None:
    (folder / "config.yaml").write_text(to_yaml(RunConfig.model_validate(changes)))


def fresh(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model("digits_cnn", 10, (1, 8, 8)).eval()


def kin_of(folder: Path) -> dict[str, Kin]:
    found = find_relatives(load_checkpoint_subject(str(folder), "model"), load_checkpoint_subject)
    assert [kin.source for kin in found] == ["pretrained", "last", "average"]
    assert all((kin.network is None) == bool(kin.why) for kin in found)
    return {kin.source: kin for kin in found}


def test_a_checkpoint_keeps_the_last_epoch_and_the_average(tmp_path: Path) -> None:
    folder = Path(checkpoint(tmp_path / "model"))
    configure(folder, training={"ema_decay": 0.9}, model={"pretrained": checkpoint(tmp_path / "before")})
    last, averaged = fresh(1), fresh(2)
    save_file(cpu_weights(last), folder / "model.safetensors")
    save_file(cpu_weights(WeightAverage(averaged, 0.9)), folder / "average.safetensors")
    found = kin_of(folder)
    wanted = {"last": last.state_dict(), "average": averaged.state_dict()}
    wanted["pretrained"] = load_file(tmp_path / "before" / "best.safetensors")
    for source, weights in wanted.items():
        network = found[source].network
        assert network is not None
        assert not network.training
        assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert len({kin.weights for kin in found.values()}) == 3
    assert found["last"].weights == kin_of(folder)["last"].weights


def test_relatives_that_cannot_be_found_are_listed_with_the_reason(tmp_path: Path) -> None:
    folder = Path(checkpoint(tmp_path / "model"))
    assert {source: kin.why for source, kin in kin_of(folder).items()} == {
        "pretrained": "the model was not fine-tuned (model.pretrained)",
        "last": "keeps no model.safetensors",
        "average": "the run kept no average of its weights (training.ema_decay)",
    }
    configure(folder, training={"ema_decay": 0.9}, model={"pretrained": str(tmp_path / "gone")})
    (folder / "average.safetensors").write_bytes(b"cut off")
    (folder / "model.safetensors").write_bytes((folder / "best.safetensors").read_bytes())
    found = kin_of(folder)
    assert found["pretrained"].why == "there is no such file or folder"
    assert found["average"].why.startswith("average.safetensors cannot be read")
    assert found["last"].why == "its weights are those of the model itself"
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    configure(folder, model={"pretrained": "models:/base/1"})
    assert kin_of(folder)["last"].why.startswith("its weights do not fit the network")
    assert kin_of(folder)["pretrained"].why == "an address of MLflow, which is not used here"
    configure(folder, model={"pretrained": checkpoint(tmp_path / "base"), "head": "new"})
    assert "its head was replaced" in kin_of(folder)["pretrained"].why


def test_examples_of_relatives_are_scored_on_the_model(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tla_service.evaluation.surrogate._STEPS", 20)
    folder = Path(checkpoint(tmp_path / "model"))
    last = fresh(1)
    save_file(cpu_weights(last), folder / "model.safetensors")
    out = tmp_path / "out"
    code, printed, message = run("--model", str(folder), "--output", str(out), "--images.transfer", "40")
    assert code == 0, printed + message
    report, kept = read_report(out / "report.json"), load_outcome(out / "transfer.npz")
    assert [(each.source, each.accuracy is None) for each in report.relatives] == [
        ("pretrained", True), ("last", False), ("average", True), ("natural", False),
    ]  # fmt: skip
    assert set(kept.broken_at) == {"clean", "last", "natural"}
    assert kept.gate is not None
    for each in report.relatives:
        if each.accuracy is not None:
            assert each.accuracy.estimate == pytest.approx(kept.standing(each.source)[~kept.gate].mean())
    assert report.accuracy["worst"].estimate <= min(
        each.accuracy.estimate for each in report.relatives if each.accuracy
    )

    data = load_dataset(DataConfig(name="digits", test_limit=40))
    images, labels = data.test.fetch(torch.arange(40)).float() / 255, data.test.labels
    network = load_checkpoint_subject(str(folder), "model").network
    attack = report.attacks["pgd3"]
    assert attack.num_steps == 3
    with torch.no_grad():
        clean = network(images).logits.argmax(1) == labels
    assert ((kept.broken_at["clean"] != 0) == clean.numpy()).all()
