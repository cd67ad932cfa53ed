"""Fine-tuning: what starts from which weights, at which rate, and what stays frozen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.training.conftest import KeepingReporter, digits_config, fit, loss_of, random_batch
from tla_service.errors import ConfigError
from tla_service.models import Architecture, ImageClassifier
from tla_service.models.small_networks import SmallCNN
from tla_service.models.wrapped import wrap
from tla_service.runtime import WorkerContext, mixed_seed
from tla_service.training.checkpoint import cpu_weights
from tla_service.training.fit import Run
from tla_service.training.optimizer import build_optimizer, set_learning_rate
from tla_service.training.pretrained import find_pretrained, set_train_mode
from tla_service.training.step import TrainingStep

NewReporter = Callable[..., KeepingReporter]


def network_of(classes: int = 10, seed: int = 7) -> ImageClassifier:
    torch.manual_seed(seed)
    return Architecture("digits_cnn").build(classes, (1, 8, 8))


def with_batchnorm(*_: Any) -> ImageClassifier:
    """A network for digits whose BatchNorm has statistics of its own."""
    network = SmallCNN((4, 4), 3, (1, 2), num_classes=10, image_shape=(1, 8, 8), normalization=nn.Identity())
    normalization = nn.BatchNorm2d(1)
    assert normalization.running_mean is not None
    normalization.running_mean.fill_(0.3)
    network.normalization = normalization
    return network


def test_a_run_starts_from_the_file_with_its_head_or_a_new_one(tmp_path: Path, reporter: KeepingReporter) -> None:
    save_file(network_of(4).state_dict(), tmp_path / "four.safetensors")
    theirs = network_of(4).state_dict()
    source = str(tmp_path / "four.safetensors")
    with pytest.raises(ConfigError, match=r"its head has 4 classes, the data has 10; set model\.head to new"):
        find_pretrained(digits_config(model={"pretrained": source}), network_of())
    config = digits_config(model={"pretrained": source, "head": "new"})
    run = Run(config, WorkerContext(), reporter)
    found = find_pretrained(config, run.build())
    assert found.notes == (f"starting from {source} with a new head for 10 classes",)
    run.start(found.state_dict)
    torch.manual_seed(mixed_seed(config.seed, 0))
    drawn = run.build().state_dict()
    for name, value in run.state.network.state_dict().items():
        assert torch.equal(value, drawn[name] if name.startswith("fc.") else theirs[name]), name

    save_file(network_of(10).state_dict(), tmp_path / "ten.safetensors")
    kept = find_pretrained(digits_config(model={"pretrained": str(tmp_path / "ten.safetensors")}), network_of(seed=8))
    assert all(torch.equal(kept.state_dict[name], value) for name, value in network_of(10).state_dict().items())


def test_a_head_of_the_same_size_can_be_drawn_anew(tmp_path: Path) -> None:
    save_file(network_of(10).state_dict(), tmp_path / "w.safetensors")
    config = digits_config(model={"pretrained": str(tmp_path / "w.safetensors"), "head": "new"})
    assert {"fc.weight", "fc.bias"}.isdisjoint(find_pretrained(config, network_of()).state_dict)


@pytest.mark.parametrize("changed", [{"activation": "silu"}, {"normalization": "per_image"}], ids=str)
def test_weights_of_another_function_are_refused(reporter: KeepingReporter, changed: dict[str, str]) -> None:
    fit(digits_config(training={"epochs": 1, "max_steps": 1}, model=changed), WorkerContext(), reporter)
    config = digits_config(model={"pretrained": str(reporter.checkpoints[-1])})
    ((field, value),) = changed.items()
    with pytest.raises(ConfigError, match=rf"^model\.pretrained=.*another {field}; set model\.{field} to {value}"):
        find_pretrained(config, network_of())
    same = config.model_copy(update={"model": config.model.model_copy(update=changed)})
    assert find_pretrained(same, Architecture.of(same.model).build(10, (1, 8, 8))).state_dict


@pytest.mark.parametrize(("head", "rate"), [("new", 1), ("keep", 0.5)])
def test_settings_of_the_head_need_one(tmp_path: Path, head: str, rate: float) -> None:
    headless = wrap(
        "network:build", nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()), nn.Identity(), 10, (1, 8, 8), "0"
    )
    save_file(headless.state_dict(), tmp_path / "w.safetensors")
    model = {"pretrained": str(tmp_path / "w.safetensors"), "head": head}
    config = digits_config(model=model, optimizer={"body_rate": rate})
    with pytest.raises(
        ConfigError, match=r"^(model\.head=new|optimizer\.body_rate=0\.5): .*no linear head; leave it out"
    ):
        find_pretrained(config, headless)


@pytest.mark.parametrize("decay", ["kernels", "all"])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_the_body_learns_more_slowly_than_the_head(name: str, decay: str) -> None:
    """One step of SGD on the same gradients: the body moves by a tenth, the head as before."""
    moved: dict[float, dict[str, Tensor]] = {}
    for rate in (1.0, 0.1):
        network = network_of()
        optimizer = {"name": name, "momentum": 0.0, "weight_decay": 0.01, "decay": decay, "body_rate": rate}
        config = digits_config(model={"pretrained": "x"}, optimizer=optimizer)
        before = cpu_weights(network)
        made = build_optimizer(network, config)
        set_learning_rate(made, 0.01)
        for index, parameter in enumerate(network.parameters()):
            parameter.grad = torch.full_like(parameter, 0.5 + index)
        made.step()
        assert sum(len(group["params"]) for group in made.param_groups) == len(list(network.parameters()))
        assert made.param_groups[0]["lr"] == 0.01, "the rate that metrics report"
        moved[rate] = {key: value - before[key] for key, value in network.state_dict().items()}
    for key, whole in moved[1.0].items():
        factor = 1.0 if key.startswith("fc.") else 0.1
        torch.testing.assert_close(moved[0.1][key], whole * factor, atol=1e-7, rtol=1e-3)


def test_without_a_slower_body_the_optimizer_is_as_before() -> None:
    """A checkpoint of an earlier version has these groups, and no others."""
    groups = build_optimizer(network_of(), digits_config()).state_dict()["param_groups"]
    assert [group["params"] for group in groups] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all("rate" not in group for group in groups)


def test_frozen_statistics_stay_and_the_rest_of_batchnorm_learns(
    new_reporter: NewReporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Architecture, "build", with_batchnorm)
    for frozen in (True, False):
        config = digits_config(model={"pretrained": "x"}, training={"freeze_batchnorm": frozen, "epochs": 1})
        run = Run(config, WorkerContext(), new_reporter())
        run.start(None)
        before = cpu_weights(run.state.network)
        assert run.train_epoch()
        after = run.state.network.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        statistics = {f"normalization.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
        assert changed & statistics == (set() if frozen else statistics)
        assert {"normalization.weight", "normalization.bias"} <= changed


def test_frozen_statistics_normalize_in_training_as_in_evaluation() -> None:
    config = digits_config(model={"pretrained": "x"}, training={"freeze_batchnorm": True})
    network = with_batchnorm()
    images = torch.rand(5, 1, 8, 8)
    expected = network.eval()(images).logits
    assert torch.equal(set_train_mode(network, config)(images).logits, expected)
    assert network.training
    assert not torch.equal(set_train_mode(network, digits_config())(images).logits, expected)


@pytest.mark.parametrize("method", ["at", "tla", "tla_sa"])
@pytest.mark.parametrize("pool", ["batch", "separate"])
def test_the_clean_weight_mixes_clean_and_adversarial_loss(method: str, pool: str) -> None:
    """At weights 0, 1 and between: the cross-entropies of clean and adversarial images by their own forward pass."""
    network = network_of(4).double()
    batch = random_batch(pool=12)
    sums = {}
    for weight in (0.0, 0.3, 1.0):
        config = digits_config(method=method, loss={"clean_weight": weight}, mining={"pool": pool, "pool_size": 12})
        step = TrainingStep(network, config, WorkerContext())
        sums[weight] = float(loss_of(step, batch)[1][1])
    clean = nn.functional.cross_entropy(network(batch.anchors.images).logits, batch.anchors.labels, reduction="sum")
    assert sums[1.0] == pytest.approx(clean.item(), rel=1e-6)
    assert sums[0.0] > sums[1.0], "the attack raises the loss"
    assert sums[0.3] == pytest.approx(0.7 * sums[0.0] + 0.3 * sums[1.0], rel=1e-6)
