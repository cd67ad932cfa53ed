"""Every combination of what shapes a step: it takes a step, or is refused with a sentence that names a field."""

import itertools
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tests.training.conftest import digits_config, random_batch
from tla_service.config import TRIPLET_METHODS
from tla_service.models.small_networks import SmallCNN
from tla_service.runtime import WorkerContext
from tla_service.training.step import TOTALS, TrainingStep

IMAGES, POOL = 4, 4
ATTACKS: tuple[dict[str, Any], ...] = (
    {"kind": "pgd", "num_steps": 2},
    {"kind": "n_fgsm"},
    {"kind": "n_fgsm", "noise": 0.0},
    {"kind": "free", "free_replays": 2},
)
METHODS = ("natural", "at", "alp", "tla", "tla_rn", "tla_sa", "trades", "mart")
# What is not multiplied out: each combination of the rest meets one of these, in turn.
OTHERS: tuple[dict[str, dict[str, Any]], ...] = (
    {},
    {"attack": {"batchnorm": "train"}},
    {"training": {"batchnorm_roles": "apart"}},
    {"speed": {"fold_batchnorm": False}},
    {"attack": {"random_start": False}},
    {"mining": {"scope": "global", "keep_probability": 0.5}},
    {"training": {"precision": "bfloat16"}},
    {"mining": {"clean_noise": 0.1, "clean_noise_on": "all"}},
    {"attack": {"objective": "kl"}},
    {"mining": {"similarity": "cosine", "random_negatives": "any"}, "loss": {"norm_form": "mean_squares"}},
)


def combined(*parts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Sections merged, later ones winning."""
    sections: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, fields in part.items():
            sections[name] = sections.get(name, {}) | fields
    return sections


def reasons(method: str, attack: dict[str, Any], mining: dict[str, Any], **_: Any) -> set[str]:
    """Fields at which a combination makes no sense; all others must take a step."""
    kind, ascends_divergence = attack["kind"], attack.get("objective") == "kl" or method == "trades"
    mines_first = method in TRIPLET_METHODS and mining["pool"] == "separate"
    found = {
        "attack.kind": kind != "pgd" and attack["norm"] == "l2",
        "attack.awp": attack["awp"] and (kind == "free" or method == "natural"),
        "attack.noise": ascends_divergence and attack.get("noise") == 0,
        "attack.random_start": ascends_divergence and kind == "pgd" and not attack.get("random_start", True),
        "mining.queries": kind == "free" and mines_first and mining["queries"] == "last_step",
    }
    return {field for field, applies in found.items() if applies}


@pytest.mark.parametrize("method", METHODS)
def test_a_combination_takes_a_step_or_is_refused_with_a_sentence(method: str) -> None:
    torch.manual_seed(0)
    network = SmallCNN((8,), 4, (2,), num_classes=4, image_shape=(1, 8, 8), normalization=nn.Identity()).train()
    network.convolutions.insert(1, nn.BatchNorm2d(8))
    batch = random_batch(IMAGES, pool=POOL, dtype=torch.float32)
    others = itertools.cycle(OTHERS)
    attacks = itertools.product(ATTACKS, ("linf", "l2"), (False, True))
    minings = itertools.product(("batch", "separate"), ("final", "last_step"), ("own", "same_class", "both"))
    if method not in TRIPLET_METHODS:  # without triplets mining changes nothing
        minings = iter([("batch", "final", "own"), ("separate", "last_step", "both")])
    for (attack, norm, awp), (pool, queries, positives) in itertools.product(attacks, minings):
        other = next(others)
        mining = {"pool": pool, "queries": queries, "positives": positives, "pool_size": POOL}
        sections = combined({"attack": attack | {"norm": norm, "awp": awp}, "mining": mining}, other)
        told = f"{method} {sections}"
        try:
            config = digits_config(method=method, **sections)
        except ValidationError as error:
            (found,) = error.errors()
            assert found["type"] == "cross_field", told
            assert found["ctx"]["field"] in reasons(method, **sections), told
            continue
        assert not reasons(method, **sections), told
        for totals in TrainingStep(network, config, WorkerContext()).updates(batch, 0):
            sums = dict(zip(TOTALS, totals.tolist(), strict=True))
            assert sums["images"] == IMAGES, told
            assert all(torch.tensor(list(sums.values())).isfinite()), told
            gradients = [parameter.grad for parameter in network.parameters()]
            assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients), told
            assert any(gradient.any() for gradient in gradients if gradient is not None), told
            network.zero_grad(set_to_none=True)
