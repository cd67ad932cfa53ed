"""Adversarial weights, free training, N-FGSM and the guard, against the papers' formulas in plain loops."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor

from tests.training.conftest import KeepingReporter, digits_config, fit, random_batch
from tests.training.test_step import network
from tla_service.runtime import WorkerContext, generator, uniform_noise
from tla_service.training.adversary import Adversary
from tla_service.training.meter import has_collapsed
from tla_service.training.step import TrainingStep
from tla_service.training.validation import ImageSet

CPU = torch.device("cpu")
NewReporter = Callable[..., KeepingReporter]


def gradients(net: torch.nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
    loss = F.cross_entropy(net(images).logits, labels)
    return list(torch.autograd.grad(loss, list(net.parameters())))


def test_adversarial_weights_are_the_papers_update() -> None:
    """w <- w - rate * gradient(w + v), v = gamma * |w| * g / |g| kernel by kernel (Wu et al. 2020, eqs. 8 to 10)."""
    gamma, batch = 0.05, random_batch()
    net, oracle = network(), network()
    config = digits_config(method="at", attack={"awp": True, "awp_gamma": gamma})
    step = TrainingStep(net, config, WorkerContext())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    step.backward(batch, 7)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    adversarial = step.adversary.craft(batch.anchors, generator(CPU, 7))
    ascent = gradients(oracle, adversarial, batch.anchors.labels)
    with torch.no_grad():
        for parameter, gradient in zip(oracle.parameters(), ascent, strict=True):
            if parameter.ndim > 1:
                parameter.add_(gamma * parameter.norm() * gradient / gradient.norm())
    expected = gradients(oracle, adversarial, batch.anchors.labels)
    plain = gradients(net, adversarial, batch.anchors.labels)
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
    assert any(not torch.allclose(a, b) for a, b in zip(expected, plain, strict=True))


def hardest(anchors: Tensor, labels: Tensor, pool: Tensor, pool_labels: Tensor) -> list[int]:
    """Row of the pool of each anchor's closest embedding of another class, by |cos|."""
    found = []
    for anchor, label in zip(anchors, labels, strict=True):
        rows = [row for row in range(len(pool)) if pool_labels[row] != label]
        found.append(max(rows, key=lambda row: abs(float(F.cosine_similarity(anchor, pool[row], dim=0)))))
    return found


@pytest.mark.parametrize("pool", ["batch", "separate"])
def test_adversarial_weights_keep_the_negatives_mined_before_they_moved(pool: str) -> None:
    """TLA's loss with the negatives of w, ascended to w + v and differentiated there."""
    gamma, batch = 0.3, random_batch(pool=12)
    net, oracle = network(), network()
    loss = {"margin": 0.5, "norm_weight": 0.0}
    config = digits_config(loss=loss, mining={"pool": pool, "pool_size": 12}, attack={"awp": True, "awp_gamma": gamma})
    step = TrainingStep(net, config, WorkerContext())
    step.backward(batch, 7)
    labels, clean = batch.anchors.labels, batch.anchors.images
    adversarial = step.adversary.craft(batch.anchors, generator(CPU, 7))
    drawn = batch.anchors if pool == "batch" else batch.pool
    assert drawn is not None

    def mine() -> list[int]:
        with torch.no_grad():
            return hardest(oracle(adversarial).embeddings, labels, oracle(drawn.images).embeddings, drawn.labels)

    def objective(rows: list[int]) -> list[Tensor]:
        attacked = oracle(adversarial)
        near, far = oracle(clean).embeddings, oracle(drawn.images[rows]).embeddings
        to_near = 1 - F.cosine_similarity(attacked.embeddings, near).abs()
        to_far = 1 - F.cosine_similarity(attacked.embeddings, far).abs()
        hinge = F.relu(to_near - to_far + config.loss.margin).mean()
        total = F.cross_entropy(attacked.logits, labels) + config.loss.triplet_weight * hinge
        return list(torch.autograd.grad(total, list(oracle.parameters())))

    rows = mine()
    ascent = objective(rows)
    with torch.no_grad():
        for parameter, gradient in zip(oracle.parameters(), ascent, strict=True):
            if parameter.ndim > 1:
                parameter.add_(gamma * parameter.norm() * gradient / gradient.norm())
    for parameter, expected in zip(net.parameters(), objective(rows), strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-12)
    assert mine() != rows  # the moved weights would have chosen others


def test_adversarial_weights_move_batchnorm_once_and_draw_the_same_noise() -> None:
    from tla_service.models import build_model

    batch = random_batch(pool=12)
    mining = {"pool": "separate", "pool_size": 12, "clean_noise": 0.1}
    moved, found = {}, {}
    for awp in (False, True):
        torch.manual_seed(0)
        net = build_model("mnist_cnn", 4, (1, 8, 8)).double().train()
        config = digits_config(mining=mining, attack={"awp": awp, "awp_gamma": 1e-12})
        found[awp] = TrainingStep(net, config, WorkerContext()).backward(batch, 3)
        moved[awp] = dict(net.named_buffers())
    for name, value in moved[False].items():
        torch.testing.assert_close(moved[True][name], value)
    torch.testing.assert_close(found[True], found[False])


def test_free_training_is_the_papers_loop() -> None:
    """Images and weights by one backward pass, the perturbation kept between replays (Shafahi et al. 2019, alg. 1)."""
    replays, epsilon, rate, batch = 3, 0.15, 0.1, random_batch()
    net, oracle = network(), network()
    config = digits_config(method="at", attack={"kind": "free", "free_replays": replays, "epsilon": epsilon})
    step = TrainingStep(net, config, WorkerContext())
    optimizer = torch.optim.SGD(net.parameters(), lr=rate)
    updates = 0
    for _ in step.updates(batch, 5):
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
    assert updates == replays
    images, labels = batch.anchors.images, batch.anchors.labels
    perturbation = uniform_noise(images, epsilon, generator(CPU, 5))
    assert perturbation.abs().max() <= epsilon
    for _ in range(replays):
        adversarial = (images + perturbation).clamp(0, 1).requires_grad_()
        loss = F.cross_entropy(oracle(adversarial).logits, labels)
        to_images, *to_weights = torch.autograd.grad(loss, [adversarial, *oracle.parameters()])
        with torch.no_grad():
            for parameter, gradient in zip(oracle.parameters(), to_weights, strict=True):
                parameter.sub_(rate * gradient)
        perturbation = (perturbation + epsilon * to_images.sign()).clamp(-epsilon, epsilon)
    for trained, expected in zip(net.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(trained, expected, rtol=1e-9, atol=1e-12)


CHEAP = {"attack": {"kind": "n_fgsm", "on_collapse": "stop"}, "training": {"epochs": 4}}


def collapse_in(monkeypatch: pytest.MonkeyPatch, *robust: float) -> None:
    """Let validation find these robust accuracies, one an epoch, then the last for ever."""
    values = list(robust)

    def measure(*_: Any) -> dict[str, float]:
        found = values.pop(0) if len(values) > 1 else values[0]
        return {"robust_accuracy": found, "clean_accuracy": 0.9}

    monkeypatch.setattr(ImageSet, "measure", measure)


def test_a_collapse_ends_the_run_with_its_best_weights(
    monkeypatch: pytest.MonkeyPatch, reporter: KeepingReporter
) -> None:
    collapse_in(monkeypatch, 0.4, 0.6, 0.2)
    result = fit(digits_config(method="at", **CHEAP), WorkerContext(), reporter)
    assert [epoch["validation/robust_accuracy"] for epoch in result.history] == [0.4, 0.6, 0.2]
    assert result.best["epoch"] == 1
    assert result.test
    told = [record["message"] for record in reporter.records if record["event"] == "collapse"]
    assert told == [
        "single-step training collapsed in epoch 2: robust accuracy on validation 20.0%, before 60.0%; "
        "the run ends with the best weights"
    ]


def test_after_a_collapse_training_goes_on_with_pgd_also_when_resumed(
    monkeypatch: pytest.MonkeyPatch, new_reporter: NewReporter
) -> None:
    config = digits_config(method="at", **CHEAP | {"attack": {"kind": "n_fgsm", "on_collapse": "pgd"}})
    weights = []
    for resume in (False, True):
        collapse_in(monkeypatch, 0.5, 0.1)
        reporter = new_reporter()
        result = fit(config, WorkerContext(), reporter)
        if resume:
            again = new_reporter(resume_from=reporter.checkpoints[1])
            collapse_in(monkeypatch, 0.1)
            result = fit(config, WorkerContext(), again)
            reporter = again
        assert len(result.history) == 4
        assert has_collapsed(result.history)
        weights.append((reporter.checkpoints[-1] / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize("kind", ["pgd", "n_fgsm", "free"])
def test_going_on_with_pgd_needs_more_than_one_step(kind: str) -> None:
    """One step is what has collapsed, and what would be watched no more."""
    attack = {"kind": kind, "on_collapse": "pgd", "num_steps": 1, "step_size": 0.15}
    with pytest.raises(ValidationError, match=r"on_collapse=pgd: attack\.num_steps=1 is a single step too"):
        digits_config(method="at", attack=attack)
    assert not digits_config(method="at", attack=attack | {"kind": "pgd", "num_steps": 2}).watches_collapse


@pytest.mark.parametrize(
    ("changes", "robust"),
    [
        ({"attack": {"num_steps": 2}}, (0.6, 0.1)),  # many steps are not watched
        ({"attack": {"kind": "n_fgsm"}}, (0.6, 0.31)),  # a dip is no collapse
        ({"attack": {"kind": "free", "free_replays": 2, "on_collapse": "ignore"}}, (0.6, 0.1)),
    ],
)
def test_other_runs_go_on(
    monkeypatch: pytest.MonkeyPatch, reporter: KeepingReporter, changes: dict[str, Any], robust: tuple[float, ...]
) -> None:
    collapse_in(monkeypatch, *robust)
    result = fit(digits_config(method="at", training={"epochs": 3}, **changes), WorkerContext(), reporter)
    assert len(result.history) == 3
    assert not has_collapsed(result.history)


def test_the_radius_grows_in_proportion_until_the_warmup_ends() -> None:
    config = digits_config(method="at", attack={"warmup": 0.5, "num_steps": 5, "step_size": 0.1, "epsilon": 0.15})
    adversary, batch = TrainingStep(network(), config, WorkerContext()).adversary, random_batch()

    def reached(done: float) -> Tensor:
        adversary.grow(done)
        return (adversary.craft(batch.anchors, generator(CPU, 1)) - batch.anchors.images).abs().amax()

    for done, epsilon in ((0.1, 0.03), (0.25, 0.075), (0.5, 0.15), (0.9, 0.15)):
        torch.testing.assert_close(reached(done), torch.tensor(epsilon, dtype=torch.float64), rtol=0, atol=1e-12)


def test_training_meets_each_radius_at_its_step(monkeypatch: pytest.MonkeyPatch, new_reporter: NewReporter) -> None:
    """The share is of all steps, whichever epoch they are in, and of the run's own after a resumption."""
    shares: list[float] = []
    monkeypatch.setattr(Adversary, "grow", lambda _self, done: shares.append(done))
    config = digits_config(method="at", attack={"warmup": 0.5}, training={"epochs": 2})
    fit(config, WorkerContext(), new_reporter())
    assert shares == pytest.approx([(step + 1) / len(shares) for step in range(len(shares))])
