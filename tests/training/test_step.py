"""One batch against plain loops: what each method minimises, and what a step leaves alone."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.conftest import digits_config, loss_of, random_batch
from tla_service.config import RunConfig
from tla_service.data import StepBatch
from tla_service.models import ImageClassifier, ModelOutput, build_model
from tla_service.runtime import WorkerContext, generator
from tla_service.training import adversary as adversary_module
from tla_service.training import step as step_module
from tla_service.training.step import TOTALS, TrainingStep

POOL = 12


def network(seed: int = 0) -> ImageClassifier:
    torch.manual_seed(seed)
    return build_model("digits_cnn", 4, (1, 8, 8)).double()


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Stands in for an attack in tests of the objective: any fixed other images will do."""
    return (images * 0.8 + 0.1).flip(-1)


@pytest.fixture(autouse=True)
def fixed_attack(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "real_attack" not in request.keywords:
        monkeypatch.setattr(adversary_module, "craft", lambda _logits, images, *_: shifted(images))


def cosine(first: list[float], second: list[float]) -> float:
    dot = sum(a * b for a, b in zip(first, second, strict=True))
    return dot / math.sqrt(sum(a * a for a in first)) / math.sqrt(sum(b * b for b in second))


def cross_entropy(logits: list[float], label: int, smoothing: float) -> float:
    log_sum = math.log(sum(math.exp(value) for value in logits))
    losses = [log_sum - value for value in logits]
    return (1 - smoothing) * losses[label] + smoothing * sum(losses) / len(losses)


def expected_total(config: RunConfig, net: nn.Module, batch: StepBatch) -> float:
    """The objective, image by image, in plain Python (method: authors' and paper's equations)."""
    loss, mining = config.loss, config.mining

    def run(images: torch.Tensor) -> tuple[list[list[float]], list[list[float]]]:
        output: ModelOutput = net(images)
        seen = output.logits if loss.triplet_layer == "logits" else output.embeddings
        return output.logits.tolist(), seen.tolist()

    labels = batch.anchors.labels.tolist()
    weights = [1.0] * len(labels) if batch.weights is None else batch.weights.tolist()
    if config.method == "natural":
        logits, _ = run(batch.anchors.images)
        rows = zip(weights, logits, labels, strict=True)
        return sum(weight * cross_entropy(row, label, loss.label_smoothing) for weight, row, label in rows)
    adversarial_logits, adversarial = run(shifted(batch.anchors.images))
    clean_logits, clean = run(batch.anchors.images)
    pool, pool_labels = clean, labels
    if mining.pool == "separate" and batch.pool is not None:
        pool, pool_labels = run(batch.pool.images)[1], batch.pool.labels.tolist()
    total = 0.0
    clean_weight = (0.5 if config.method == "alp" else 0.0) if loss.clean_weight is None else loss.clean_weight
    for row, label in enumerate(labels):
        total += weights[row] * label_term(config, clean_weight, adversarial_logits[row], clean_logits[row], label)
        if config.method == "alp":
            pairs = zip(adversarial_logits[row], clean_logits[row], strict=True)
            total += weights[row] * loss.logit_pairing_weight * sum((a - b) ** 2 for a, b in pairs)
        pairs = zip(adversarial[row], clean[row], strict=True)
        total += weights[row] * loss.embedding_match_weight * sum((a - b) ** 2 for a, b in pairs)
        if not config.mines_triplets:
            continue
        others = [index for index, other in enumerate(pool_labels) if other != label]
        if not others:
            continue
        negative = pool[max(others, key=lambda index: (abs(cosine(adversarial[row], pool[index])), -index))]
        for positive, margin in positives(config, row, batch, labels, clean, run):
            anchor, near = (positive, adversarial[row]) if config.method == "tla_sa" else (adversarial[row], positive)
            hinge = max(0.0, abs(cosine(anchor, negative)) - abs(cosine(anchor, near)) + margin)
            members = (anchor, near, negative)
            if loss.norm_form == "l2_norms":
                norm = sum(math.sqrt(sum(value * value for value in member)) for member in members)
                total += loss.triplet_weight * hinge + loss.norm_weight * norm
            else:
                norm = sum(sum(value * value for value in member) / len(member) for member in members)
                total += loss.triplet_weight * (hinge + loss.norm_weight * norm)
    return total


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(value) for value in logits]
    return [power / sum(powers) for power in powers]


def label_term(config: RunConfig, clean_weight: float, attacked: list[float], clean: list[float], label: int) -> float:
    """Cross-entropy, or TRADES' (Zhang et al. 2019, eq. 5) or MART's term (Wang et al. 2020, eqs. 8 to 10)."""
    smoothing, term = config.loss.label_smoothing, config.robust_term
    p, q = softmax(clean), softmax(attacked)
    divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    if term == "trades":
        return cross_entropy(clean, label, smoothing) + config.robust_weight * divergence
    if term == "mart":
        wrong = max(q[k] for k in range(len(q)) if k != label)
        boosted = cross_entropy(attacked, label, smoothing) - math.log(1 - wrong)
        return boosted + config.robust_weight * divergence * (1 - p[label])
    adversarial_share = (1 - clean_weight) * cross_entropy(attacked, label, smoothing)
    return adversarial_share + clean_weight * cross_entropy(clean, label, smoothing)


def positives(
    config: RunConfig, row: int, batch: StepBatch, labels: list[int], clean: list[list[float]], run: Any
) -> list[tuple[list[float], float]]:
    """Positive embeddings of one anchor with their margins."""
    found = []
    if config.mining.positives != "same_class":
        found.append((clean[row], config.loss.margin * config.loss.own_margin_scale))
    if config.mining.positives != "own":
        if config.mining.pool == "separate":
            assert batch.positives is not None
            other = run(batch.positives.images)[1][row]
        else:
            walk = [(row + step) % len(labels) for step in range(1, len(labels) + 1)]
            other = clean[next(index for index in walk if labels[index] == labels[row])]
        found.append((other, config.loss.margin))
    return found


OBJECTIVES: dict[str, dict[str, Any]] = {
    "natural": {"method": "natural", "loss": {"label_smoothing": 0.1}},
    "at": {"method": "at"},
    "at with clean images": {"method": "at", "loss": {"clean_weight": 0.3, "embedding_match_weight": 0.2}},
    "alp": {"method": "alp"},
    "tla": {"loss": {"margin": 0.3}},
    "tla, the code's norm": {
        "loss": {"norm_form": "mean_squares", "norm_weight": 0.5, "margin": 0.3, "triplet_weight": 2}
    },
    "tla, both positives": {"mining": {"positives": "both"}, "loss": {"own_margin_scale": 3.0, "margin": 0.1}},
    "tla, another image": {"mining": {"positives": "same_class"}, "loss": {"margin": 0.2}},
    "tla, clean share": {"loss": {"clean_weight": 0.25, "embedding_match_weight": 0.1, "label_smoothing": 0.2}},
    "switched anchor": {"method": "tla_sa", "loss": {"margin": 0.3}},
    "separate pool": {"mining": {"pool": "separate", "pool_size": POOL}, "loss": {"margin": 0.3}},
    "separate pool, both": {
        "mining": {"pool": "separate", "pool_size": POOL, "positives": "both"},
        "loss": {"margin": 0.3},
    },
    "separate pool, another": {"mining": {"pool": "separate", "pool_size": POOL, "positives": "same_class"}},
    "triplets of logits": {"loss": {"triplet_layer": "logits", "margin": 0.3}},
    "triplets of logits, separate pool": {
        "mining": {"pool": "separate", "pool_size": POOL, "positives": "both"},
        "loss": {"triplet_layer": "logits"},
    },
    "trades": {"method": "trades"},
    "trades, smoothed and lighter": {"method": "trades", "loss": {"robust_weight": 1.5, "label_smoothing": 0.1}},
    "mart": {"method": "mart"},
    "mart, with a pull of embeddings": {
        "method": "mart",
        "loss": {"robust_weight": 2.0, "embedding_match_weight": 0.3, "label_smoothing": 0.1},
    },
    "tla on trades": {"loss": {"robust_term": "trades", "margin": 0.3}},
    "tla on mart, separate pool": {
        "loss": {"robust_term": "mart", "margin": 0.3},
        "mining": {"pool": "separate", "pool_size": POOL, "positives": "same_class"},
    },
    "separate pool, switched": {
        "method": "tla_sa",
        "mining": {"pool": "separate", "pool_size": POOL, "positives": "both"},
    },
}


@pytest.mark.parametrize("changes", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.parametrize(("reduction", "weighted"), [("mean", False), ("sum", False), ("mean", True)])
def test_the_objective_is_what_plain_loops_compute(changes: dict[str, Any], reduction: str, weighted: bool) -> None:
    config = digits_config(**changes | {"loss": changes.get("loss", {}) | {"reduction": reduction}})
    net, batch = network(), random_batch(pool=POOL)
    if weighted:
        batch = replace(batch, weights=torch.tensor([0.5, 2.0, 1.0, 3.0])[batch.anchors.labels])
    loss, totals = loss_of(TrainingStep(net, config, WorkerContext()), batch)
    expected = expected_total(config, net, batch)
    divisor = len(batch.anchors.labels) if reduction == "mean" else 1
    assert loss.item() == pytest.approx(expected / divisor, rel=1e-9)
    assert totals[TOTALS.index("loss")].item() == pytest.approx(expected, rel=1e-9)
    assert totals[TOTALS.index("images")].item() == len(batch.anchors.labels)


def test_anchors_without_a_negative_are_counted_and_cost_nothing() -> None:
    batch = random_batch(classes=1, pool=POOL)
    for changes in ({}, {"mining": {"pool": "separate", "pool_size": POOL}}, {"method": "tla_rn"}):
        config = digits_config(**changes)
        loss, totals = loss_of(TrainingStep(network(), config, WorkerContext()), batch)
        sums = dict(zip(TOTALS, totals.tolist(), strict=True))
        assert sums["without_negative"] == sums["images"] == 24
        assert sums["triplet"] == sums["norm"] == sums["active_triplets"] == 0
        assert sums["loss"] == pytest.approx(sums["cross_entropy"])
        assert loss.item() == pytest.approx(sums["cross_entropy"] / 24)


def test_random_negatives_of_any_class_may_be_the_anchors_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    original = step_module.mine_random

    def remember(*arguments: Any, **options: Any) -> Any:
        drawn.append((options["any_class"], original(*arguments, **options)))
        return drawn[-1][1]

    monkeypatch.setattr(step_module, "mine_random", remember)
    batch = random_batch(200)
    for choice in ("any", "other_class"):
        config = digits_config(method="tla_rn", mining={"random_negatives": choice})
        loss_of(TrainingStep(network(), config, WorkerContext()), batch, seed=1)
    same = [(batch.anchors.labels[found.indices] == batch.anchors.labels).double().mean().item() for _, found in drawn]
    assert same[0] == pytest.approx(0.25, abs=0.1)
    assert same[1] == 0


@pytest.mark.parametrize("roles", ["own", "all"])
def test_noise_reaches_the_roles_it_is_set_for(monkeypatch: pytest.MonkeyPatch, roles: str) -> None:
    seen: list[tuple[torch.Tensor, ...]] = []
    original = TrainingStep._forward

    def remember(self: TrainingStep, *images: torch.Tensor) -> Any:
        seen.append(images)
        return original(self, *images)

    monkeypatch.setattr(TrainingStep, "_forward", remember)
    batch = random_batch(pool=POOL)
    mining = {"pool": "separate", "pool_size": POOL, "positives": "both", "clean_noise": 0.1, "clean_noise_on": roles}
    config = digits_config(mining=mining | {"clean_noise_round": True})
    loss_of(TrainingStep(network(), config, WorkerContext()), batch)
    adversarial, negatives, own, positives = seen[0]
    assert torch.equal(adversarial, shifted(batch.anchors.images))
    assert batch.pool is not None
    assert batch.positives is not None
    distance = (own - batch.anchors.images).abs()
    assert 0.05 < distance.max() <= 0.1 + 0.5 / 255
    torch.testing.assert_close((own * 255).round(), own * 255)
    assert torch.equal(positives, batch.positives.images) == (roles == "own")
    from_pool = [any(torch.equal(image, other) for other in batch.pool.images) for image in negatives]
    assert all(from_pool) == (roles == "own")


@pytest.mark.real_attack
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_an_attack_leaves_network_gradients_and_statistics_alone(mode: str) -> None:
    torch.manual_seed(0)
    net = build_model("mnist_cnn", 4, (1, 8, 8)).double().train()
    config = digits_config(attack={"batchnorm": mode}, model={"name": "mnist_cnn"})
    step = TrainingStep(net, config, WorkerContext())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    batch = random_batch()
    adversarial = step.adversary.craft(batch.anchors, generator(torch.device("cpu"), 0))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(module.training for module in net.modules())
    assert (adversarial - batch.anchors.images).abs().max() <= config.attack.epsilon + 1e-12
    assert not torch.equal(adversarial, batch.anchors.images)


def test_a_step_leaves_no_setting_of_the_one_before() -> None:
    for speed in ({"tune_kernels": True, "mode": "exact"}, {}):
        TrainingStep(network(), digits_config(speed=speed), WorkerContext())
        assert (torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32) == (bool(speed), not speed)


def test_batchnorm_sees_roles_together_or_apart() -> None:
    batch = random_batch()
    clean, adversarial = batch.anchors.images, shifted(batch.anchors.images)
    means = {}
    for roles in ("together", "apart"):
        torch.manual_seed(0)
        net = build_model("mnist_cnn", 4, (1, 8, 8)).double().train()
        first = next(module for module in net.modules() if isinstance(module, nn.BatchNorm2d))
        inputs: list[torch.Tensor] = []
        first.register_forward_pre_hook(lambda _module, given, kept=inputs: kept.append(given[0].detach()))
        step = TrainingStep(net, digits_config(training={"batchnorm_roles": roles}), WorkerContext())
        step._forward(adversarial, clean)
        means[roles] = inputs
        momentum, running = first.momentum, torch.zeros_like(first.running_mean)  # type: ignore[arg-type]
        assert momentum is not None
        for given in inputs:
            running = (1 - momentum) * running + momentum * given.mean((0, 2, 3))
        torch.testing.assert_close(first.running_mean, running)
    assert len(means["together"]) == 1
    assert len(means["apart"]) == 2


def test_bfloat16_keeps_losses_in_float32_and_near_the_float32_ones() -> None:
    batch = random_batch(dtype=torch.float32)
    found = {}
    for precision in ("float32", "bfloat16"):
        net = network().float()
        config = digits_config(training={"precision": precision}, loss={"margin": 0.3})
        loss, _ = loss_of(TrainingStep(net, config, WorkerContext()), batch)
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters())
        assert loss.dtype == torch.float32
        found[precision] = loss.item()
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.02)
