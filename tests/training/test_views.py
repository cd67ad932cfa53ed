"""The second view and CutMix: their part of the loss and its gradient, BatchNorm's statistics, and resuming."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training.conftest import digits_config, random_batch, weights_of
from tests.training.test_resume import train
from tests.training.test_step import expected_total, fixed_attack, network, shifted
from tla_service.attacks import Attack, craft
from tla_service.data import Batch, StepBatch, load_dataset, strong
from tla_service.models import build_model
from tla_service.runtime import WorkerContext
from tla_service.training.adversary import moved_weights
from tla_service.training.precheck import training_batches
from tla_service.training.step import TOTALS, TrainingStep
from tla_service.training.terms import cross_entropy

__all__ = ["fixed_attack"]
SHARE = 0.3  # of the second view
VIEW: dict[str, Any] = {"data": {"augment": "autoaugment"}, "training": {"batchnorm_roles": "apart"}}


def batch_with_view() -> StepBatch:
    batch = random_batch()
    return replace(batch, view=Batch(random_batch(seed=1).anchors.images, batch.anchors.labels))


def view_alone(batch: StepBatch) -> StepBatch:
    assert batch.view is not None
    return StepBatch(batch.view, None, None, batch.global_size, batch.weights)


def gradients(net: nn.Module, config: Any, batch: StepBatch) -> tuple[float, list[Tensor]]:
    """The loss's sum and its gradients."""
    net.zero_grad()
    totals = TrainingStep(net, config, WorkerContext()).backward(batch, 0)  # type: ignore[arg-type]
    return totals[TOTALS.index("loss")].item(), [parameter.grad.clone() for parameter in net.parameters()]  # type: ignore[union-attr]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("term", ["cross_entropy", "trades", "mart"])
def test_the_second_view_takes_its_share_of_the_classification_term_and_no_triplets(
    term: str, *, weighted: bool
) -> None:
    net, batch = network(), batch_with_view()
    if weighted:
        batch = replace(batch, weights=torch.tensor([0.5, 2.0, 1.0, 3.0])[batch.anchors.labels])
    loss = {"robust_term": term, "margin": 0.3}
    baseline = digits_config(method={"cross_entropy": "at"}.get(term, term))
    triplets = digits_config(loss=loss)
    both = digits_config(**VIEW, loss=loss | {"view_weight": SHARE})
    first = replace(batch, view=None)

    total, found = gradients(net, both, batch)
    expected = expected_total(triplets, net, first)
    expected += SHARE * (expected_total(baseline, net, view_alone(batch)) - expected_total(baseline, net, first))
    assert total == pytest.approx(expected, rel=1e-9)
    parts = [gradients(net, *pair)[1] for pair in ((triplets, first), (baseline, view_alone(batch)), (baseline, first))]
    for gradient, whole, view, base in zip(found, *parts, strict=True):
        torch.testing.assert_close(gradient, whole + SHARE * (view - base))


def test_weights_are_perturbed_along_the_first_view_and_both_views_are_learnt_there() -> None:
    net, batch = network(), batch_with_view()
    changes: dict[str, Any] = {"method": "trades", "loss": {"view_weight": SHARE}, **VIEW}
    _, found = gradients(net, digits_config(**changes, attack={"awp": True, "awp_gamma": 0.1}), batch)
    plain = digits_config(**changes)
    gradients(net, plain, replace(batch, view=None))
    with moved_weights(net, 0.1):
        _, expected = gradients(net, plain, batch)
    for gradient, other in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("method", ["natural", "at", "trades"])
def test_running_statistics_are_those_of_the_first_view_alone(method: str) -> None:
    torch.manual_seed(0)
    net = build_model("mnist_cnn", 4, (1, 8, 8)).double().train()
    batch, config = batch_with_view(), digits_config(method=method, loss={"view_weight": SHARE}, **VIEW)
    without, twin = copy.deepcopy(net), copy.deepcopy(net)
    total, _ = gradients(net, config, batch)
    base, _ = gradients(without, config, replace(batch, view=None))
    for (name, value), expected in zip(net.named_buffers(), without.buffers(), strict=True):
        assert torch.equal(value, expected), name
    assert all(module.track_running_stats for module in net.modules() if isinstance(module, nn.BatchNorm2d))
    # The view itself is normalized by the batch, role by role.
    assert batch.view is not None
    clean, attacked = twin(batch.view.images).logits, twin(shifted(batch.view.images)).logits
    losses = nn.functional.cross_entropy(attacked if method == "at" else clean, batch.view.labels, reduction="sum")
    if method == "trades":
        losses = losses + 6 * nn.functional.kl_div(attacked.log_softmax(1), clean.softmax(1), reduction="sum")
    assert total - base == pytest.approx(SHARE * losses.item(), rel=1e-9)


def test_only_the_view_is_augmented_strongly_and_both_are_of_the_same_images() -> None:
    plain, second = digits_config(), digits_config(loss={"view_weight": SHARE}, **VIEW)
    replaced = digits_config(data={"augment": "autoaugment"})
    dataset = load_dataset(plain.data)
    rows = torch.arange(len(dataset.train))
    first, both, alone = (
        next(training_batches(config, dataset.train, rows, WorkerContext()).epoch(0))
        for config in (plain, second, replaced)
    )
    assert first.view is None
    assert alone.view is None
    assert both.view is not None
    assert torch.equal(both.anchors.images, first.anchors.images)
    assert torch.equal(both.view.labels, first.anchors.labels)
    assert not torch.equal(both.view.images, first.anchors.images)
    assert not torch.equal(alone.anchors.images, first.anchors.images)


def mix(images: Tensor, labels: Tensor, num_classes: int, _seed: int) -> tuple[Tensor, Tensor]:
    """In place of CutMix: shares that are known, for tests of the loss."""
    shares = nn.functional.one_hot(labels, num_classes).to(images.dtype)
    return 0.7 * images + 0.3 * images.roll(1, 0), 0.7 * shares + 0.3 * shares.roll(1, 0)


@pytest.mark.parametrize("term", ["natural", "at", "trades", "alp"])
def test_the_label_term_of_mixed_images_is_shared_by_both_labels(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strong, "cut_and_mix", mix)
    net, batch = network(), random_batch()
    plain = digits_config(method=term, loss={"label_smoothing": 0.1})
    config = digits_config(method=term, loss={"label_smoothing": 0.1}, data={"cutmix": True})
    total, _ = gradients(net, config, batch)
    images, _ = mix(batch.anchors.images, batch.anchors.labels, 4, 0)
    mixed = [
        replace(batch, anchors=Batch(images, labels)) for labels in (batch.anchors.labels, batch.anchors.labels.roll(1))
    ]
    first, second = (expected_total(plain, net, each) for each in mixed)
    assert total == pytest.approx(0.7 * first + 0.3 * second, rel=1e-9)


def test_triplets_see_whole_images_and_the_view_is_mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strong, "cut_and_mix", mix)
    net, batch = network(), batch_with_view()
    config = digits_config(loss={"view_weight": SHARE}, data={"cutmix": True}, training=VIEW["training"])
    total, _ = gradients(net, config, batch)
    triplets, baseline = digits_config(), digits_config(method="at")
    assert batch.view is not None
    images, _ = mix(batch.view.images, batch.view.labels, 4, 0)
    labels = batch.view.labels
    views = [StepBatch(Batch(images, each), None, None, batch.global_size) for each in (labels, labels.roll(1))]
    mixed = 0.7 * expected_total(baseline, net, views[0]) + 0.3 * expected_total(baseline, net, views[1])
    first = replace(batch, view=None)
    expected = expected_total(triplets, net, first) - SHARE * expected_total(baseline, net, first) + SHARE * mixed
    assert total == pytest.approx(expected, rel=1e-9)


def test_the_attack_ascends_the_loss_with_both_labels() -> None:
    net, batch = network().eval(), random_batch()
    images, shares = mix(batch.anchors.images, batch.anchors.labels, 4, 0)
    given = images.clone().requires_grad_()
    logits = net(given).logits
    first, second = (cross_entropy(logits, labels) for labels in (batch.anchors.labels, batch.anchors.labels.roll(1)))
    (gradient,) = torch.autograd.grad((0.7 * first + 0.3 * second).sum(), given)
    attack = Attack(epsilon=0.1, step_size=0.1, num_steps=1, random_start=False)
    found = craft(lambda each: net(each).logits, images, shares, attack)
    torch.testing.assert_close(found, (images + 0.1 * gradient.sign()).clamp(0, 1))


def test_a_run_with_two_views_resumes_exactly(tmp_path: Path) -> None:
    config = digits_config(
        data={"augment": "autoaugment", "cutmix": True, "flip": True, "train_limit": 60, "validation_fraction": 0.2},
        loss={"view_weight": 0.5, "robust_term": "trades"},
        training={"ema_decay": 0.9, "batchnorm_roles": "apart", "epochs": 2, "global_batch_size": 30},
        schedule={"name": "one_cycle"},
        attack={"awp": True},
    )
    train(tmp_path / "whole", config)
    train(tmp_path / "stopped", config, epochs=1)
    train(tmp_path / "stopped", config)
    whole, resumed = (max((tmp_path / name / "checkpoints").iterdir()) for name in ("whole", "stopped"))
    assert whole.name == resumed.name == "step-000000004"
    assert weights_of(resumed) == weights_of(whole)


def test_mixing_depends_on_the_step_alone() -> None:
    step = TrainingStep(network(), digits_config(method="at", data={"cutmix": True}), WorkerContext())
    batch = random_batch()
    images = [step._prepared(batch, 0, 2, number, 0).anchors.images for number in (1, 2, 1)]
    assert torch.equal(images[0], images[2])
    assert not torch.equal(images[0], images[1])
