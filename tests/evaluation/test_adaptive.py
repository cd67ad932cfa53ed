"""The attack on classifier and detector: in the ball, and what it claims is what the detector itself says."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.evaluation.test_detection import embedded, pair_auc
from tests.report.subjects import digits, trained
from tla_service.attacks import Attack
from tla_service.data import Batch
from tla_service.evaluation.adaptive import AdaptiveMeasurement, DetectionScore, attack_detector
from tla_service.evaluation.detection import adaptive_detection, fit_detector, risk_curve, threshold_for
from tla_service.evaluation.embedding import Embedded, attacked, embed
from tla_service.evaluation.shards import Shard
from tla_service.inference.detector import Detector

EXAMPLE = Path(__file__).parents[2] / "docs" / "evaluation.md"
RULES, COVARIANCES = ["likeliest", "predicted"], ["full", "tied", "diagonal"]


@cache
def example() -> dict[str, Any]:
    """The names that the example of docs/evaluation.md leaves behind."""
    blocks = re.findall(r"```python\n(.*?)```", EXAMPLE.read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "attack_detector" in block)
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(block, EXAMPLE.name, "exec"), names)
    return names


@cache
def clean() -> Batch:
    return Batch(digits().test.fetch(torch.arange(40)).float() / 255, digits().test.labels[:40])


@cache
def detector(**changes: Any) -> Detector:
    rows = torch.arange(400)
    bank = Batch(digits().train.fetch(rows).float() / 255, digits().train.labels[rows])
    return fit_detector(embed(trained(), [bank]), **({"covariance": "tied"} | changes))


def scores_of(images: torch.Tensor, **changes: Any) -> tuple[np.ndarray, np.ndarray]:
    """Whether each image is classified correctly, and its score, by the detector in NumPy."""
    seen = embed(trained(), [Batch(images, clean().labels)])
    return seen.correct, detector(**changes).score(seen.embeddings, seen.predictions)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("covariance", COVARIANCES)
def test_the_differentiable_score_is_the_detectors(covariance: str, rule: str, normalize: bool) -> None:
    training, seen = embedded([0] * 9 + [1] * 8 + [3] * 12, classes=4), embedded([0, 1, 2, 3] * 5, seed=5, classes=4)
    own = fit_detector(training, covariance=covariance, rule=rule, normalize=normalize)
    score = DetectionScore(own, torch.device("cpu"))
    rows, predictions = torch.from_numpy(seen.embeddings).requires_grad_(), torch.from_numpy(seen.predictions)
    found = score(score.densities(rows), predictions)
    np.testing.assert_allclose(found.detach().numpy(), own.score(seen.embeddings, seen.predictions), rtol=1e-4)
    # And so is its gradient, where the predicted class has a Gaussian: class 2 has none.
    (gradient,) = torch.autograd.grad(found.sum(), rows)
    step = np.zeros_like(seen.embeddings)
    step[:, 1] = 1e-3
    ahead, behind = (own.score(seen.embeddings + side * step, seen.predictions) for side in (1, -1))
    slopes = np.where(ahead > -1e30, (ahead - behind) / 2e-3, 0.0)
    np.testing.assert_allclose(gradient[:, 1].numpy(), slopes, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("norm", "epsilon"), [("linf", 0.1), ("l2", 0.7)])
def test_each_evasion_is_in_the_ball_misclassified_and_trusted(norm: Any, epsilon: float, rule: str) -> None:
    attack, random = Attack(norm=norm, epsilon=epsilon), torch.Generator().manual_seed(0)
    found = attack_detector(trained(), detector(rule=rule), clean(), attack, "evasion", random)
    away = (found - clean().images).flatten(1)
    assert (away.abs().amax(1) if norm == "linf" else away.norm(dim=1)).max() <= epsilon + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    correct, scores = scores_of(found, rule=rule)
    moved = away.abs().amax(1).numpy() > 0
    assert not correct[moved].any()  # what it changed, it broke: by the network, not by the attack's own count
    assert moved.sum() > 10
    ordinary = attacked(
        trained(), [clean()], Attack(norm=norm, epsilon=epsilon, step_size=epsilon / 4, num_steps=20), 0
    )
    plainly_correct, plain = scores_of(ordinary[0].images, rule=rule)
    both = ~plainly_correct & moved
    assert (scores >= plain - 1e-3)[both].mean() > 0.9
    assert scores[both].mean() > plain[both].mean() + 5


def test_rejection_lowers_scores_within_the_ball() -> None:
    attack = Attack(epsilon=0.1)
    found = attack_detector(trained(), detector(), clean(), attack, "rejection", torch.Generator().manual_seed(0))
    assert (found - clean().images).abs().max() <= 0.1 + 1e-6
    (_, before), (_, after) = scores_of(clean().images), scores_of(found)
    assert (after < before - 10).all()


def test_shards_keep_each_image_and_do_not_depend_on_others() -> None:
    measure = AdaptiveMeasurement(detector(), "evasion", Attack(epsilon=0.1), 3, 10)
    rows = np.arange(20)
    shards = [
        Shard(trained(), None, digits().test.fetch(part), digits().test.labels[part], part.numpy(), torch.device("cpu"))
        for part in torch.arange(20).split(10)
    ]
    parts = [measure.run(shard) for shard in reversed(shards)][::-1]
    merged = measure.merge(parts)
    assert merged.rows.tolist() == rows.tolist()
    again = measure.run(shards[1])
    np.testing.assert_array_equal(again["embeddings"], merged.embedded.embeddings[10:])


def test_a_detector_that_only_holds_against_unaware_attacks_is_caught() -> None:
    names = example()
    found, own = names["found"], names["detector"]
    assert found.unaware.auc > 0.99
    assert found.auc < 0.3  # below the default of rules.min_detection_auc
    assert found.selective["unaware"].evaded.estimate < 0.02
    assert found.selective["adaptive"].evaded.estimate > 0.9
    # The claim by a plain count over the images: in the ball, wrong, accepted.
    images, adversarial = names["images"], names["evasion"].images
    assert (adversarial - images.images).abs().max() <= names["attack"].epsilon + 1e-6
    output = names["network"](adversarial)
    wrong = (output.logits.argmax(1) != images.labels).numpy()
    trusted = own.score(output.embeddings.numpy(), output.logits.argmax(1).numpy()) >= names["threshold"]
    assert found.selective["adaptive"].evaded.estimate == (wrong & trusted).mean()
    assert found.rejected.estimate > 0.9
    assert found.false_rejections.estimate < 0.1


def test_the_example_prints_what_the_docs_say(capsys: pytest.CaptureFixture[str]) -> None:
    example.cache_clear()
    example()
    assert f"It prints `{capsys.readouterr().out.strip()}`" in EXAMPLE.read_text()


def test_risk_is_the_share_wrong_among_the_most_trusted() -> None:
    random = np.random.default_rng(0)
    scores, correct = random.normal(size=30), random.random(30) > 0.4
    order = sorted(range(30), key=lambda at: -scores[at])
    for count, risk in enumerate(risk_curve(scores, correct), start=1):
        assert risk == pytest.approx(np.mean([not correct[at] for at in order[:count]]))
    # Equal scores are in no order: their errors are spread over them.
    np.testing.assert_allclose(risk_curve(np.ones(4), np.array([True, False, False, True])), 0.5)


def test_figures_are_those_of_plain_counting() -> None:
    labels = [0, 1, 2] * 12
    own = fit_detector(embedded(labels * 3, seed=1))
    parts = {name: embedded(labels, seed=at, spread=0.8) for at, name in enumerate(("natural", "unaware", "evasion"))}
    low = embedded(labels, seed=9, spread=2.0)
    natural = parts["natural"]
    threshold = threshold_for(own.score(natural.embeddings, natural.predictions), natural.correct, 0.2)
    found, risks = adaptive_detection(own, threshold, "training", **parts, rejection=low, epsilon=0.1, seed=0)

    def score(part: Embedded, at: int) -> float:
        return float(own.score(part.embeddings[at : at + 1], part.predictions[at : at + 1])[0])

    shown = []
    for at in range(len(labels)):
        wrong = [score(part, at) for part in parts.values() if not part.correct[at]]
        shown.append((max(wrong), False) if wrong else (score(parts["unaware"], at), True))
    adaptive, clean_scores = found.selective["adaptive"], [score(natural, at) for at in range(len(labels))]
    assert adaptive.coverage.estimate == np.mean([value >= threshold for value, _ in shown])
    assert adaptive.evaded.estimate == np.mean([value >= threshold and not right for value, right in shown])
    assert adaptive.accuracy.estimate == np.mean([right for value, right in shown if value >= threshold])
    assert adaptive.aurc == pytest.approx(risks["adaptive"].mean())
    together = np.array(clean_scores + [value for value, _ in shown])
    assert found.auc == pytest.approx(pair_auc(together, np.array([*natural.correct, *(right for _, right in shown)])))
    right = [at for at in range(len(labels)) if natural.correct[at]]
    lowest = [min(score(part, at) for part in (natural, parts["unaware"], low)) for at in right]
    assert found.rejected.estimate == np.mean(np.array(lowest) < threshold)
    assert found.false_rejections.estimate == np.mean([clean_scores[at] < threshold for at in right])
