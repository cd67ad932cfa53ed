"""AutoAttack through its authors' package, on any number of classes, with per-image results.

Source: Croce and Hein 2020, arXiv 2003.01690. The package's targeted APGD needs four logits and stops on fewer; what
cannot run is left out here by name instead.
"""

import logging
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tla_service.attacks.gradient import UNBROKEN, LogitsFn, is_right
from tla_service.attacks.shortcuts import project_linf, search_squares
from tla_service.config.radii import Norm

_NORMS = {"linf": "Linf", "l2": "L2"}
VERSION = "standard"
_STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
# Stages by their numbers in per-image results, from 1 on; files of earlier versions rest on this order.
ALL_STAGES = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
# The DLR loss divides by the distance of the 1st to the 3rd logit; its targeted form reads the 4th.
_FEWEST_CLASSES = {"apgd-dlr": 3, "apgd-t": 4}
_SQUARE_FEWEST_ROWS = 5  # in L2 it lays tiles of a fifth of the image's height
# What the package warns of, by words of its message, and what it means; its own advice names options and a file that
# this project does not have.
_WARNINGS = {
    "randomized defense": "predictions for the same image differ between calls (randomized defense): the standard "
    "version overestimates its robustness",
    "probability distribution": "the outputs look like probabilities, not logits: a softmax may mask gradients",
    "dynamic defense": "the forward pass computes gradients (dynamic defense): AutoAttack may be too weak",
    "zero gradient": "some images have zero gradient under a loss of APGD",
}
# Numbers of classes and targets are looked after here: see `autoattack_stages`.
_NO_CONCERN = ("DLR loss", "target classes")
ZERO_GRADIENT = _WARNINGS["zero gradient"]


@dataclass(frozen=True)
class AutoAttackResult:
    """What AutoAttack did to each image, and its distinct warnings about the network.

    `adversarial` images (N, C, H, W) stay clean where they were not broken, or misclassified from the start.
    `broken_at` (N,), int64, is 0 in the latter case, the number of the stage in `ALL_STAGES`, from 1 on, that broke the
    image, else `UNBROKEN`.
    """

    adversarial: Tensor
    broken_at: Tensor
    stages: tuple[str, ...]
    left_out: dict[str, str]
    warnings: tuple[str, ...]

    @property
    def robust(self) -> Tensor:
        """Whether the network is right after all stages (N,), bool."""
        return self.broken_at == UNBROKEN


def run_autoattack(
    logits_fn: LogitsFn,
    images: Tensor,
    labels: Tensor,
    *,
    norm: Norm,
    epsilon: float,
    seed: int,
    batch_size: int,
    only: Collection[str] | None = None,
    square_queries: int = 5000,
    crafted_on: LogitsFn | None = None,
) -> AutoAttackResult:
    """Run the standard version's stages one after another, each on the images that still stand.

    Targeted stages take as many targets as there are other classes, nine at most. Global random states are restored.
    Parameters that want a gradient get one in ``.grad``.

    Args:
        logits_fn: Images (N, C, H, W) in [0, 1] to logits (N, K); in eval mode, not a DDP wrapper.
        images: Clean images (N, C, H, W), float32, in [0, 1]; any C.
        labels: True classes (N,), int64.
        norm: Norm of the perturbation.
        epsilon: Radius, in pixels of [0, 1] (L-infinity) or as a length. Above 0.
        seed: Fixes every draw; the package starts each batch of each stage from it.
        batch_size: Images per forward pass.
        only: Run only these stages; None: all.
        square_queries: Queries of the Square attack; the package's own number is 5000.
        crafted_on: The same function, computed faster. Images that it alone calls broken are attacked again on
            `logits_fn`, which has the last word.
    """
    from pyautoattack import AutoAttack

    images = images.detach()
    with torch.no_grad():
        logits = torch.cat([logits_fn(part) for part in images.split(batch_size)])
        again = logits_fn(images[:batch_size])
    stages, left_out = autoattack_stages(logits.shape[1], norm, images.shape[2], only)
    broken_at = torch.where(is_right(logits, labels), UNBROKEN, 0)
    adversarial = images.clone()

    def attack(stage: str, left: Tensor, on: LogitsFn) -> Tensor:
        """Attack the images `left` (n,) on a function; whether it alone calls each broken (n,)."""
        library: Any = AutoAttack(
            lambda pixels: on(pixels).float(),
            eps=epsilon,
            norm=_NORMS[norm],
            seed=seed,
            version=VERSION,
            device=images.device,
        )
        for targeted in (library.fab, library.apgd_targeted):
            targeted.n_target_classes = min(targeted.n_target_classes, logits.shape[1] - 1)
        library.square.n_queries = square_queries
        if norm == "linf" and torch.allclose(again, logits[:batch_size], atol=1e-4):
            library.square.attack_single_run = partial(search_squares, library.square)
        library.attacks_to_run = [stage]
        result, predicted = library.run_standard_evaluation(images[left], labels[left], batch_size=batch_size)
        with torch.no_grad():
            judged = torch.cat([logits_fn(part) for part in result.split(batch_size)])
        broken = ~is_right(judged, labels[left])
        adversarial[left[broken]] = result[broken]
        broken_at[left[broken]] = 1 + ALL_STAGES.index(stage)
        return (predicted != labels[left]) & ~broken

    with _undisturbed(images.device) as messages:
        for stage in stages:
            left = (broken_at == UNBROKEN).nonzero().squeeze(1)
            if not len(left):
                break
            unconfirmed = attack(stage, left, crafted_on or logits_fn)
            if crafted_on is not None and unconfirmed.any():
                attack(stage, left[unconfirmed], logits_fn)
    return AutoAttackResult(adversarial, broken_at, tuple(stages), left_out, tuple(dict.fromkeys(messages)))


def autoattack_stages(
    classes: int, norm: Norm, rows: int, only: Collection[str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """Stages of the standard version that run on a network of `classes` and images of `rows`; those left out, and why.

    With three classes ``apgd-dlr`` runs in the place of ``apgd-t``; with two neither can run. `only` restricts them.
    """
    stages, left_out = [], {}
    for stage in _STANDARD:
        needed = _FEWEST_CLASSES.get(stage, 2)
        if only is not None and stage not in only:
            left_out[stage] = "not asked for"
        elif classes >= needed:
            stages.append(stage)
        else:
            left_out[stage] = f"needs {needed} classes, there are {classes}"
            if classes >= _FEWEST_CLASSES["apgd-dlr"]:
                left_out[stage] += "; apgd-dlr runs in its place"
                stages.append("apgd-dlr")
    if "square" in stages and norm == "l2" and rows < _SQUARE_FEWEST_ROWS:
        stages.remove("square")
        left_out["square"] = f"needs images of {_SQUARE_FEWEST_ROWS} rows in {norm}, these have {rows}"
    return stages, left_out


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[list[str]]:
    """Undo the package's changes to the process: it seeds the global generators, drops the trace function and logs."""
    from pyautoattack import checks, fab_base

    # The package counts gradients taken in forward passes per process, so other networks' would count here.
    checks.funcs.update(dict.fromkeys(checks.funcs, 0))
    logger, messages, trace = logging.getLogger("auto-attack"), list[str](), sys.gettrace()

    def keep(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if record.levelno >= logging.WARNING and not any(words in message for words in _NO_CONCERN):
            known = (meaning for words, meaning in _WARNINGS.items() if words in message)
            messages.append(next(known, message))
        return False  # nothing is printed

    logger.addFilter(keep)
    projection, fab_base.projection_linf = fab_base.projection_linf, project_linf
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield messages
    finally:
        fab_base.projection_linf = projection
        logger.removeFilter(keep)
        sys.settrace(trace)
