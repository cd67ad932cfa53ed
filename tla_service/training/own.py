"""The user's own attack, loss terms and miner, named by `module:function`; see docs/extending.md."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tla_service.attacks import Attack, craft_freely
from tla_service.config import RunConfig
from tla_service.errors import ConfigError, UserError, one_line
from tla_service.evaluation.shards import logits_of
from tla_service.evaluation.suite import evaluation_attack
from tla_service.models import ModelOutput
from tla_service.models.own_code import load_function
from tla_service.runtime import generator, wide
from tla_service.training.adversary import training_attack
from tla_service.triplets import Negatives

Term = Callable[[ModelOutput, ModelOutput, Tensor], Tensor]
Miner = Callable[..., Negatives]
_ROUNDING = 1e-5


def load_term(path: str, code: bytes | None = None) -> Term:
    """An own loss term: outputs for adversarial and clean images, and labels, to (N,)."""
    field = f"loss.extra.{path}"
    function = load_function(field, path, code)

    def term(adversarial: ModelOutput, clean: ModelOutput, labels: Tensor) -> Tensor:
        values = function(*(ModelOutput(*map(wide, output)) for output in (adversarial, clean)), labels)
        if not isinstance(values, Tensor) or values.shape != labels.shape:
            remedy = f"return one value for each image, ({len(labels)},)"
            raise ConfigError(field, path, f"returned {_shape(values)} for {len(labels)} images", remedy)
        return values

    return term


def load_miner(path: str, code: bytes | None = None) -> Miner:
    """An own miner, called without gradients: anchors (N, D), their classes, pool (M, D), its classes, generator."""
    function = load_function("mining.miner", path, code)

    @torch.no_grad()
    def mine(anchors: Tensor, labels: Tensor, pool: Tensor, pool_labels: Tensor, random: torch.Generator) -> Negatives:
        found = function(wide(anchors.detach()), labels, wide(pool.detach()), pool_labels, random)
        pair, n = found if isinstance(found, tuple) and len(found) == 2 else (found, None), len(labels)
        if [_shape(part) for part in pair] != [f"({n},) int64", f"({n},) bool"]:
            remedy = f"return each anchor's row of the pool, ({n},) int64, and whether it has a negative, ({n},) bool"
            reason = f"returned {' and '.join(map(_shape, pair))} for {n} anchors"
            raise ConfigError("mining.miner", path, reason, remedy)
        return Negatives(*pair)

    return mine


def check_own(config: RunConfig, network: nn.Module, images: Tensor, labels: Tensor, code: bytes | None = None) -> None:
    """Call each own function of a run once, on images (N, C, H, W) and labels (N,); UserError if one does not fit."""
    random = generator(images.device, config.seed)
    for field, path in config.own_functions.items():
        if field == "mining.miner":
            flaws = _flaws_of_miner(load_miner(path, code), network(images).embeddings, labels, random)
            _check(field, path, "(anchors, anchor_labels, pool, pool_labels, generator)", flaws, len(images))
        elif field.startswith("loss."):
            other = images if config.method == "natural" else torch.rand_like(images)
            flaws = _flaws_of_term(load_term(path, code), network(other), network(images), labels)
            _check(field, path, "(adversarial, clean, labels)", flaws, len(images))
        elif field == "attack.kind":
            check_attack(field, path, training_attack(config, code), network, images, labels, random)
        else:
            name = field.removesuffix(".kind")
            attack = evaluation_attack(config.evaluation.attacks[name], config.attack, config.data.name, name, code)
            check_attack(field, path, attack, network, images, labels, random)


def check_attack(
    field: str, path: str, attack: Attack, network: nn.Module, images: Tensor, labels: Tensor, random: torch.Generator
) -> None:
    """As `check_own`, for one attack."""
    flaws = _flaws_of_attack(attack, network, images, labels, random)
    _check(field, path, "(logits_fn, images, labels, attack, generator)", flaws, len(images))


_Flaws = Iterator[tuple[Any, str, str]]


def _check(field: str, path: str, call: str, flaws: _Flaws, count: int) -> None:
    try:
        found = next((flaw for is_flawed, *flaw in flaws if is_flawed), None)
    except UserError as error:
        raise type(error)(field, path, error.reason, error.remedy) from error
    except Exception as error:
        reason = f"fails on {count} training images ({type(error).__name__}: {one_line(error)})"
        raise ConfigError(field, path, reason, f"correct it; it is called as {path.split(':')[1]}{call}") from error
    if found is not None:
        raise ConfigError(field, path, *found)


def _flaws_of_attack(
    attack: Attack, network: nn.Module, images: Tensor, labels: Tensor, random: torch.Generator
) -> _Flaws:
    found = craft_freely(logits_of(network), images, labels, attack, random)
    yield not found.isfinite().all(), "returned pixels that are not finite", "correct it"
    low, high = float(found.min()), float(found.max())
    outside = low < -_ROUNDING or high > 1 + _ROUNDING
    yield outside, f"returned pixels in [{low:.4g}, {high:.4g}]", "clamp them to [0, 1]"
    order = torch.inf if attack.norm == "linf" else 2
    length = float(torch.linalg.vector_norm((found - images).flatten(1), order, dim=1).max())
    reason = f"left the ball: a perturbation of {length:.4g} with epsilon {attack.epsilon:.4g}"
    yield length > attack.epsilon + _ROUNDING, reason, "project the images onto it"


def _flaws_of_term(term: Term, adversarial: ModelOutput, clean: ModelOutput, labels: Tensor) -> _Flaws:
    values = term(adversarial, clean, labels)
    yield not values.isfinite().all(), "returned values that are not finite", "correct it"
    yield not values.requires_grad, "has no gradient", "compute it from logits or embeddings, without detaching them"
    gradients = torch.autograd.grad(values.sum(), (*adversarial, *clean), allow_unused=True)
    broken = any(not gradient.isfinite().all() for gradient in gradients if gradient is not None)
    yield broken, "has a gradient that is not finite", "keep square roots and logarithms away from 0"


def _flaws_of_miner(miner: Miner, pool: Tensor, labels: Tensor, random: torch.Generator) -> _Flaws:
    rows = miner(pool.flip(0), labels, pool, labels, random).indices
    wrong = int(rows.min()) < 0 or int(rows.max()) >= len(pool)
    yield wrong, f"returned rows that a pool of {len(pool)} does not have", "return rows of the pool, from 0"


def _shape(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} {value.dtype}".replace("torch.", "")
