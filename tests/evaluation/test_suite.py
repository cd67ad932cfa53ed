"""The suite: fates of images, shards, files, sweeps."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tla_service.attacks import UNBROKEN, Attack, attack_images, craft
from tla_service.config.adversary import AttackConfig
from tla_service.config.radii import documented_radius
from tla_service.errors import ConfigError, UnavailableError
from tla_service.evaluation import suite
from tla_service.evaluation.paper import epsilon_sweep, paper_columns, restart_curve, step_sweep, sweep_curve
from tla_service.evaluation.shards import (
    AutoAttackRun,
    Shard,
    ShardOutcome,
    load_outcome,
    merge_outcomes,
    save_outcome,
)
from tla_service.evaluation.suite import AttackMeasurement, evaluation_attack
from tla_service.models import ModelOutput

CPU = torch.device("cpu")
PGD = Attack(kind="pgd", epsilon=0.03, step_size=0.01, num_steps=1, num_restarts=4)


@pytest.fixture(autouse=True)
def _few_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Square's 5000 take seconds, however small the network."""
    monkeypatch.setattr(suite, "run_autoattack", partial(suite.run_autoattack, square_queries=200))


class Wavy(nn.Module):
    """Small, and rough enough that restarts matter."""

    def __init__(self, seed: int = 0, classes: int = 3) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        self.hidden = nn.Parameter(torch.randn(16, 6, generator=draws))
        self.output = nn.Parameter(torch.randn(6, classes, generator=draws))

    def forward(self, images: Tensor) -> ModelOutput:
        embeddings = (6 * (images - 0.5).flatten(1) @ self.hidden).sin()
        return ModelOutput(embeddings @ self.output, embeddings)


def pictures(network: nn.Module, count: int = 40) -> tuple[Tensor, Tensor]:
    """uint8 images, the first of every five labelled wrongly."""
    images = torch.randint(60, 200, (count, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(9))
    labels = network(images.float() / 255).logits.argmax(1)
    labels[::5] = (labels[::5] + 1) % 3
    return images, labels


def evaluate(network: nn.Module, images: Tensor, labels: Tensor, attacks: Any = None, **changes: Any) -> ShardOutcome:
    surrogate, indices = changes.pop("surrogate", None), changes.pop("indices", range(len(labels)))
    shard = Shard(network, surrogate, images, labels, np.array(indices), CPU)
    settings = {"transfer": {}, "autoattack": None, "seed": 0, "batch_size": 16} | changes
    measurement = AttackMeasurement(attacks={"pgd": PGD} if attacks is None else attacks, **settings)
    return measurement.merge([measurement.run(shard)])


def logits(network: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda images: network(images).logits


def test_the_restart_that_breaks_an_image_equals_attacks_with_so_many_restarts() -> None:
    network = Wavy()
    images, labels = pictures(network)
    pixels = images.float() / 255
    broken_at = attack_images(logits(network), pixels, labels, PGD, torch.Generator().manual_seed(5)).broken_at
    for restarts in range(1, 5):
        attack = Attack(kind="pgd", epsilon=0.03, step_size=0.01, num_steps=1, num_restarts=restarts)
        robust = attack_images(logits(network), pixels, labels, attack, torch.Generator().manual_seed(5)).robust
        assert torch.equal(robust, (broken_at == UNBROKEN) | (broken_at > restarts))
    assert set(broken_at.tolist()) >= {UNBROKEN, 0, 1, 2}


def test_standing_counts_restarts_by_hand() -> None:
    outcome = ShardOutcome(np.arange(5), np.zeros(5, dtype=np.int64), {"pgd": np.array([0, 1, 2, 7, UNBROKEN])})
    assert outcome.standing("pgd").tolist() == [False, False, False, False, True]
    assert outcome.standing("pgd", 1).tolist() == [False, False, True, True, True]
    assert outcome.standing("pgd", 6).tolist() == [False, False, False, True, True]
    with pytest.raises(ConfigError, match="attack=fgsm: was not run; choose from pgd"):
        outcome.standing("fgsm")


def test_clean_accuracy_and_training_mode() -> None:
    network = Wavy()
    images, labels = pictures(network)
    outcome = evaluate(network, images, labels, {})
    assert outcome.standing("clean").tolist() == [i % 5 != 0 for i in range(40)]
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_shards_and_other_attacks_do_not_change_a_fate() -> None:
    network = Wavy()
    images, labels = pictures(network)
    whole = evaluate(network, images, labels)
    more = {"fgsm": Attack(kind="fgsm", epsilon=0.05), "pgd": PGD}
    later = evaluate(network, images[16:], labels[16:], more, indices=range(16, 40))
    first = evaluate(network, images[:16], labels[:16], more)
    merged = merge_outcomes([later, first])
    assert merged.indices.tolist() == list(range(40))
    assert merged.labels.tolist() == labels.tolist()
    assert merged.broken_at["pgd"].tolist() == whole.broken_at["pgd"].tolist()
    assert set(merged.broken_at) == {"clean", "fgsm", "pgd"}
    again = evaluate(network, images, labels, seed=1)
    assert again.broken_at["pgd"].tolist() != whole.broken_at["pgd"].tolist()


def test_transfer_scores_the_surrogates_images() -> None:
    network, surrogate = Wavy(0), Wavy(1)
    images, labels = pictures(network)
    bim = Attack(kind="bim", epsilon=0.08, step_size=0.02, num_steps=5)
    outcome = evaluate(network, images, labels, {"bim": bim}, transfer={"transfer": bim}, surrogate=surrogate)
    pixels = images.float() / 255
    crafted = craft(logits(surrogate), pixels, labels, bim)
    clean = network(pixels).logits.argmax(1) == labels
    expected = clean & (network(crafted).logits.argmax(1) == labels)
    assert outcome.standing("transfer").tolist() == expected.tolist()
    assert outcome.standing("transfer").sum() > outcome.standing("bim").sum()


def test_what_autoattack_warns_of_is_kept(tmp_path: Path) -> None:
    class Random(Wavy):
        def forward(self, images: Tensor) -> ModelOutput:
            output = super().forward(images)
            return ModelOutput(output.logits + 0.01 * torch.rand_like(output.logits), output.embeddings)

    network = Random()
    images, labels = pictures(Wavy(), 12)
    outcome = evaluate(network, images, labels, {}, autoattack=("linf", 0.001), batch_size=6)
    assert len(outcome.warnings) == 1  # of each batch and stage the same
    assert "randomized defense" in outcome.warnings[0]
    save_outcome(outcome, tmp_path / "outcome.npz")
    assert load_outcome(tmp_path / "outcome.npz").warnings == outcome.warnings
    assert merge_outcomes([outcome]).warnings == outcome.warnings
    assert evaluate(Wavy(), images, labels, {}, autoattack=("linf", 0.001)).warnings == ()


def test_autoattack_is_no_weaker_and_says_what_it_left_out() -> None:
    network = Wavy()
    images, labels = pictures(network, 15)
    outcome = evaluate(network, images, labels, autoattack=("linf", 0.03))
    assert outcome.standing("autoattack").sum() <= outcome.standing("pgd").sum()
    assert not (outcome.standing("autoattack") & ~outcome.standing("clean")).any()
    assert set(outcome.left_out) == {"apgd-t"}
    assert merge_outcomes([outcome]).left_out == outcome.left_out
    assert outcome.autoattack == AutoAttackRun("standard", "linf", 0.03, ("apgd-ce", "apgd-dlr", "fab-t", "square"))


def test_shards_of_one_autoattack_are_merged() -> None:
    def shard(row: int, run: AutoAttackRun | None) -> ShardOutcome:
        return ShardOutcome(np.array([row]), np.array([0]), {"autoattack": np.array([UNBROKEN])}, autoattack=run)

    one = AutoAttackRun("standard", "linf", 0.03, ("square",))
    assert merge_outcomes([shard(1, one), shard(0, None)]).autoattack == one  # earlier versions kept no record


def test_float32_whatever_surrounds_it() -> None:
    seen = []

    class Watching(Wavy):
        def forward(self, images: Tensor) -> ModelOutput:
            seen.append((images.dtype, torch.is_autocast_enabled("cpu"), torch.backends.cudnn.allow_tf32))
            return super().forward(images)

    network = Watching()
    images, labels = pictures(Wavy())
    before = torch.backends.cudnn.allow_tf32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        evaluate(network, images, labels)
    assert set(seen) == {(torch.float32, False, False)}
    assert torch.backends.cudnn.allow_tf32 == before


def test_outcome_survives_the_disk(tmp_path: Path) -> None:
    network = Wavy()
    images, labels = pictures(network, 10)
    facts = {
        "left_out": {"apgd-t": "needs 4 classes"},
        "autoattack": AutoAttackRun("standard", "l2", 0.5, ("fab-t", "square")),
        "gate": np.arange(10) % 4 == 1,
    }
    outcome = ShardOutcome(**(vars(evaluate(network, images, labels)) | facts))
    save_outcome(outcome, tmp_path / "shards" / "0.npz")
    back = load_outcome(tmp_path / "shards" / "0.npz")
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["0.npz"]
    assert back.indices.tolist() == outcome.indices.tolist()
    assert back.labels.tolist() == outcome.labels.tolist()
    assert {k: v.tolist() for k, v in back.broken_at.items()} == {k: v.tolist() for k, v in outcome.broken_at.items()}
    assert (back.left_out, back.autoattack) == (outcome.left_out, outcome.autoattack)
    assert back.gate is not None
    assert back.gate.tolist() == facts["gate"].tolist()  # type: ignore[attr-defined]
    assert back.only(back.gate).indices.tolist() == [1, 5, 9]
    assert back.only(back.gate).standing("pgd").tolist() == back.standing("pgd")[[1, 5, 9]].tolist()


@pytest.mark.parametrize("keep", [0, 10, 300])
def test_damaged_files_are_named(tmp_path: Path, keep: int) -> None:
    network = Wavy()
    path = tmp_path / "0.npz"
    save_outcome(evaluate(network, *pictures(network, 10)), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UnavailableError, match=r"outcome=.*0\.npz: cannot be read"):
        load_outcome(path)


class Broken(Wavy):
    def forward(self, images: Tensor) -> ModelOutput:
        output = super().forward(images)
        return ModelOutput(output.logits * math.nan, output.embeddings)


class Choosy(Wavy):
    def forward(self, images: Tensor) -> ModelOutput:  # noqa: ARG002
        raise ValueError


@pytest.mark.parametrize(
    ("network", "changes", "message"),
    [
        (Broken(), {}, "not finite"),
        (Wavy(classes=2), {}, "knows 2 classes"),
        (Wavy(), {"images": torch.zeros(40, 1, 5, 5)}, "cannot take 1x5x5 images"),
        (Choosy(), {}, r"cannot take 1x4x4 images \(ValueError\)"),
    ],
)
def test_what_cannot_be_evaluated_is_one_message(network: nn.Module, changes: dict[str, Any], message: str) -> None:
    images, _ = pictures(Wavy())
    labels = torch.arange(40) % 3
    with pytest.raises(ConfigError, match=message) as caught:
        evaluate(network, **({"images": images, "labels": labels} | changes))
    assert "\n" not in str(caught.value)


TABLE_1 = {
    "mnist": (0.3, ["fgsm 1", "bim 40", "cw 40", "pgd 40", "pgd 100", "20pgd 100", "mim 200", "bb 100"]),
    "cifar10": (8 / 255, ["fgsm 1", "bim 7", "cw 30", "pgd 7", "pgd 20", "20pgd 20", "mim 40", "bb 7"]),
    "tiny_imagenet": (8 / 255, ["fgsm 1", "bim 10", "cw 10", "pgd 10", "pgd 20", "20pgd 20", "mim 40", "bb 10"]),
}


@pytest.mark.parametrize("data_name", TABLE_1)
def test_columns_are_the_papers(data_name: str) -> None:
    epsilon, expected = TABLE_1[data_name]
    columns = paper_columns(data_name)
    restarts = {1: "", 20: "20"}
    white = [f"{restarts[a.num_restarts]}{a.kind} {a.num_steps}" for a in columns.attacks.values()]
    black = [f"bb {attack.num_steps}" for attack in columns.transfer.values()]
    assert white + black == expected
    for name, attack in {**columns.attacks, **columns.transfer}.items():
        assert (attack.norm, attack.epsilon) == ("linf", epsilon)
        assert name == "fgsm" or f"{attack.kind}{attack.num_steps}" in name
        assert attack.kind == "fgsm" or attack.num_steps * (attack.step_size or 0) >= epsilon, "it reaches the edge"


@pytest.mark.parametrize("data_name", [*TABLE_1, "digits"])
def test_columns_in_l2_and_at_another_radius_keep_their_steps(data_name: str) -> None:
    usual, l2, wide = (paper_columns(data_name, *radius) for radius in ((), ("l2", 2.0), ("linf", 0.5)))
    assert list(l2.attacks) == list(usual.attacks)
    for name, attack in usual.attacks.items():
        share = (attack.step_size or 0) / documented_radius(data_name, "linf")
        assert l2.attacks[name].norm == "l2"
        assert (l2.attacks[name].step_size or 0) / 2.0 == pytest.approx(share)
        assert (wide.attacks[name].step_size or 0) / 0.5 == pytest.approx(share)
        assert evaluation_attack(l2.attacks[name], AttackConfig(), data_name, "attacks").epsilon == 2.0


def test_sets_the_paper_lacks_have_columns_too() -> None:
    assert paper_columns("fashion_mnist", epsilon=0.3) == paper_columns("mnist")
    assert paper_columns("image_folder", epsilon=8 / 255) == paper_columns("cifar10")


def test_curves_are_the_accuracies_of_their_points() -> None:
    network = Wavy()
    images, labels = pictures(network)
    by_radius, by_steps = epsilon_sweep(PGD, (0.1, 0.02)), step_sweep(PGD, 9, points=4)
    assert [round(a.step_size / a.epsilon, 6) for a in by_radius.values()] == [0.333333, 0.333333]
    assert [a.num_steps for a in by_steps.values()] == [1, 2, 4, 9]
    outcome = evaluate(network, images, labels, {**by_radius, **by_steps, "pgd": PGD})
    curve = sweep_curve(outcome, "epsilon", "pgd")
    assert curve.x == (0, 0.02, 0.1)
    clean, *rest = [point.estimate for point in curve.accuracy]
    assert clean == outcome.standing("clean").mean()
    assert rest == [outcome.standing(f"epsilon={x}").mean() for x in (0.02, 0.1)]
    assert sweep_curve(outcome, "steps", "pgd").x == (0, 1, 2, 4, 9)
    restarts = restart_curve(outcome, "pgd", 4, "restarts")
    assert [point.estimate for point in restarts.accuracy] == [outcome.standing("pgd", k).mean() for k in (1, 2, 3, 4)]
    assert restart_curve(outcome, "pgd", 4, "steps", steps_each=3).x == (3, 6, 9, 12)
