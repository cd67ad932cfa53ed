"""The public Python API: what a notebook does, on digits."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tla_service
from tests.test_core_alone import run_python
from tla_service import (
    Attack,
    ConfigError,
    EvaluationAttack,
    LossConfig,
    RunConfig,
    UserError,
    craft,
    evaluate,
    load_config,
    load_model,
    train,
)

ROOT = Path(__file__).parents[1]
TINY = {
    "data": {"train_limit": 200, "test_limit": 60},
    "training": {"epochs": 2, "global_batch_size": 50},
    "evaluation": {"test": {"pgd50x3": {"num_steps": 5}, "cw5": {"kind": "cw", "num_steps": 5}}},
}
WEAK = Attack(epsilon=0.1, step_size=0.05, num_steps=3)


class Linear(nn.Module):
    """Somebody else's network: logits alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.fc = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.norm(images).flatten(1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(load_config("digits", **TINY), tmp_path_factory.mktemp("api") / "run")


def test_every_public_name_is_there_and_shown() -> None:
    for name in tla_service.__all__:
        assert getattr(tla_service, name).__name__ == name
    assert {*tla_service.__all__} <= {*dir(tla_service)}
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        tla_service.no_such_name  # noqa: B018


def test_a_configuration_is_made_of_preset_file_environment_and_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 5\ntraining: {epochs: 3, global_batch_size: 64}\n")
    monkeypatch.setenv("TLA_TRAINING__EPOCHS", "4")
    monkeypatch.setattr(sys, "argv", ["notebook", "--no-such-flag"])
    config = load_config("digits", tmp_path / "mine.yaml", loss={"margin": 0.2}, attack={"step_size": "8/255"})
    assert type(config) is RunConfig
    assert (config.seed, config.training.epochs, config.training.global_batch_size) == (5, 4, 64)
    assert (config.loss.margin, config.loss.label_smoothing) == (0.2, 0.1), "the rest of the preset's section stays"
    assert config.attack.step_size == 8 / 255
    assert load_config(training={"epochs": 6}).training.epochs == 6
    monkeypatch.delenv("TLA_TRAINING__EPOCHS")
    assert load_config() == RunConfig()


def test_load_config_takes_sections_as_objects() -> None:
    """Fields that an object does not set keep the preset's values, as with a dictionary."""
    test = {"pgd50x3": EvaluationAttack(num_steps=5)}
    found = load_config("digits", loss=LossConfig(margin=0.2), evaluation={"test": test})
    assert found == load_config("digits", loss={"margin": 0.2}, evaluation={"test": {"pgd50x3": {"num_steps": 5}}})
    assert (found.loss.margin, found.loss.label_smoothing) == (0.2, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "digts"}, "preset=digts: no such preset; did you mean digits?"),
        ({"trainings": {}}, "trainings={}: no such setting; did you mean training?"),
        ({"output": "here"}, "output=here: no such setting"),
        ({"training": {"epoch": 1}}, "training.epoch=1: no such setting; did you mean epochs?"),
        ({"attack": {"epsilon": 8}}, "attack.epsilon=8: outside (0, 1]; write 8/255"),
    ],
)
def test_a_wrong_configuration_is_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(**arguments)


def test_training_returns_its_summary_and_does_not_repeat_itself(
    trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    output = Path(trained["checkpoint"]).parents[1]
    assert trained == json.loads((output / "summary.json").read_text())
    written = (output / "log.jsonl").stat().st_mtime_ns
    assert train(load_config("digits", **TINY), str(output)) == trained
    assert (output / "log.jsonl").stat().st_mtime_ns == written
    assert capsys.readouterr().out.startswith("this run has finished before; ")
    with pytest.raises(ConfigError, match="holds a run with another configuration"):
        train(load_config("digits", **TINY, seed=1), output)


def test_a_checkpoint_evaluates_to_the_figures_of_its_summary(trained: dict[str, Any]) -> None:
    found = evaluate(trained["checkpoint"])
    assert found == {name: trained[name] for name in ("clean_accuracy", "robust_accuracy")}
    assert [*found["robust_accuracy"]] == ["fgsm", "pgd50x3", "cw5", "worst"]
    network = load_model(trained["checkpoint"])
    assert craft(network, IMAGES, LABELS, WEAK).shape == IMAGES.shape  # as it is, with logits and embeddings
    assert evaluate(network, config=load_config("digits", **TINY)) == found


def test_any_module_is_measured_by_hand_and_left_as_it_was() -> None:
    torch.manual_seed(1)
    network = Linear()
    network.norm.eval()  # frozen in a network that trains
    images, labels = torch.rand(700, 1, 8, 8), torch.randint(10, (700,))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = evaluate(
        network, images.numpy(), labels.tolist(), attacks={"weak": WEAK, "none": Attack(epsilon=1e-6, step_size=1e-6)}
    )
    assert (network.training, network.norm.training) == (True, False)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    network.eval()
    correct = network(images).argmax(1) == labels
    assert found["clean_accuracy"] == pytest.approx(correct.double().mean().item())
    assert found["robust_accuracy"]["none"] == found["clean_accuracy"]
    assert found["robust_accuracy"]["worst"] == found["robust_accuracy"]["weak"] < found["clean_accuracy"]
    # A linear network's worst image moves each pixel by epsilon, against the margin of some other class.
    weight = network.fc.weight / (network.norm.running_var + network.norm.eps).sqrt()
    broken = torch.zeros(700, dtype=torch.bool)
    for other in range(10):
        sign = (weight[other] - weight[labels]).sign().view_as(images)
        broken |= network((images + 0.1 * sign).clamp(0, 1)).argmax(1) != labels
    assert found["robust_accuracy"]["weak"] >= (correct & ~broken).double().mean().item()


def test_adversarial_images_of_any_module() -> None:
    network, images, labels = Linear().eval(), torch.rand(20, 1, 8, 8), torch.randint(10, (20,))
    adversarial = craft(network, images, labels, WEAK)
    assert (adversarial - images).abs().max() <= 0.1 + 1e-6
    assert 0 <= adversarial.min() <= adversarial.max() <= 1
    loss = nn.functional.cross_entropy
    assert loss(network(adversarial), labels) > loss(network(images), labels)


def test_craft_refuses_what_evaluate_refuses() -> None:
    for images, attack, message in (
        (IMAGES * 255, WEAK, "outside [0, 1]; divide 8-bit images"),
        (IMAGES, Attack(kind="apgd"), "attack.kind=apgd: not one of"),
        (IMAGES, Attack(norm="l1"), "attack.norm=l1: not one of"),  # type: ignore[arg-type]
        (IMAGES, Attack(epsilon=8), "attack.epsilon=8: outside (0, 1]; write 8/255"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            craft(Linear().eval(), images, LABELS, attack)


IMAGES, LABELS = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])


def linear(pixels: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": IMAGES, "labels": LABELS}, "attacks: not given"),
        ({"attacks": {}, "config": RunConfig()}, "attacks={}: not given"),
        ({"attacks": {"a": WEAK}}, "images: not given; pass images and labels, or config"),
        ({"attacks": {"a": WEAK}, "images": IMAGES}, "labels: not given"),
        ({"attacks": {"a": WEAK}, "labels": LABELS}, "images: not given"),
        ({"attacks": {"a": WEAK}, "images": IMAGES[0], "labels": LABELS}, "images=(1, 8, 8) torch.float32: not (N, C"),
        ({"attacks": {"a": WEAK}, "images": IMAGES[:0], "labels": LABELS[:0]}, "images=(0, 1, 8, 8)"),
        ({"attacks": {"a": WEAK}, "images": (IMAGES * 255).byte(), "labels": LABELS}, "torch.uint8: not (N, C"),
        ({"attacks": {"a": WEAK}, "images": IMAGES * 255, "labels": LABELS}, "outside [0, 1]; divide 8-bit images"),
        ({"attacks": {"a": WEAK}, "images": IMAGES / 0, "labels": LABELS}, "outside [0, 1]"),
        ({"attacks": {"a": WEAK}, "images": IMAGES, "labels": LABELS[:2]}, "labels=(2,) torch.int64: not one class"),
        ({"attacks": {"a": WEAK}, "images": IMAGES, "labels": LABELS / 4}, "labels=(4,) torch.float32: not one class"),
        (
            {"attacks": {"a": WEAK}, "images": IMAGES, "labels": LABELS + 7},
            "model: knows 10 classes, the images have class 10",
        ),
        ({"attacks": {"a": WEAK}, "images": IMAGES, "labels": LABELS - 1}, "pass 4 class indices, integers from 0"),
        ({"model": "nowhere"}, "model=nowhere: there is no such folder"),
        ({"attacks": {"worst": WEAK}}, "attacks.worst: this name is reserved"),
        ({"attacks": {"a": Attack(epsilon=8)}}, "attacks.a.epsilon=8: outside (0, 1]; write 8/255"),
        ({"attacks": {"a": Attack(epsilon=0.01, step_size=0.5)}}, "attacks.a.step_size=0.5: over twice attacks.a.eps"),
        (
            {"attacks": {"a": Attack(kind="pgdd")}},
            "attacks.a.kind=pgdd: not one of fgsm, bim, pgd, mim, cw, and not module:function; did",
        ),
        ({"attacks": {"a": Attack(kind="my:own")}}, "attacks.a.kind=my:own: names a function here; pass it"),
        ({"attacks": {"a": Attack(num_restarts=0)}}, "attacks.a.num_restarts=0: input should be greater than or equal"),
        (
            {"attacks": {"a": WEAK}, "images": IMAGES, "labels": LABELS, "model": nn.Flatten(0)},
            "model: gives (64,) for 1 images; give a classifier with logits (N, K)",
        ),
        (
            {
                "attacks": {"a": WEAK},
                "images": IMAGES,
                "labels": LABELS,
                "model": nn.AdaptiveMaxPool2d(1, return_indices=True),
            },
            "model=tuple: its output is not logits (N, K)",
        ),
        (
            {"config": RunConfig(), "model": linear(64, 5)},
            "model: knows 5 classes, the images have class 9; evaluate it on the classes",
        ),
        (
            {"config": RunConfig(), "model": linear(9, 10)},
            "model: cannot take 1x8x8 images (mat1 and mat2",
        ),
    ],
)
def test_a_wrong_call_is_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        evaluate(**{"model": Linear(), **arguments})


def test_a_configuration_needs_no_torch() -> None:
    done = run_python(
        f"import sys, tla_service as t\nt.load_config('digits', **{TINY!r})\nt.UserError\n"
        "assert 'torch' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr


def test_the_examples_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 4
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TLA_DATA__TRAIN_LIMIT", "200")
    monkeypatch.setenv("TLA_DATA__TEST_LIMIT", "60")
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/api.md", "exec"), names)
    assert {"config", "result", "network", "own", "adversarial"} <= {*names}
