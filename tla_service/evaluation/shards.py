"""Shards of images, what attacks did to them, and what every evaluation runs in: eval mode and float32."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tla_service.attacks import UNBROKEN, LogitsFn
from tla_service.data import Batch
from tla_service.data.augmentation import to_unit
from tla_service.errors import ConfigError, readable
from tla_service.evaluation.results import BoolArray
from tla_service.files import whole_file
from tla_service.models.frozen import FrozenTwin, use_matrix_products
from tla_service.runtime import autocast

IntArray = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]

# Width of the noise on images, and the largest difference of logits as a share of the largest logit, and of gradients.
_PROBE, _ROUNDING, _KINKS = 0.2, 1e-4, 0.01


@contextlib.contextmanager
def float32(device: torch.device) -> Iterator[None]:
    """Compute in full float32: neither autocast nor the 19-bit TF32 that GPUs otherwise use in convolutions.

    cuDNN does not time its kernels meanwhile (`speed.tune_kernels`): restarts attack fewer and fewer images, and every
    new batch size would be timed again.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = matmul.allow_tf32 = cudnn.benchmark = False
    try:
        with autocast("float32", device):
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


@contextlib.contextmanager
def evaluating(*networks: nn.Module | None) -> Iterator[None]:
    """Put networks in eval mode, without gradients to parameters; afterwards everything is as it was.

    The libraries of attacks call ``backward``, which would fill parameters too.
    """
    given = [network for network in networks if network is not None]
    before = [(module, module.training) for network in given for module in network.modules()]
    trained = [parameter for network in given for parameter in network.parameters() if parameter.requires_grad]
    for network in given:
        network.eval().requires_grad_(requires_grad=False)
    try:
        yield
    finally:
        for module, was_training in before:
            module.training = was_training
        for parameter in trained:
            parameter.requires_grad_()


def logits_of(network: nn.Module) -> LogitsFn:
    """A network's logits as a function of images."""
    return lambda images: network(images).logits


def frozen(network: nn.Module, images: Tensor) -> nn.Module:
    """The frozen twin of a network in eval mode, which attacks take less time on; else the network itself.

    The twin is not trusted: it is used if it gives the network's logits, up to rounding, on these images (N, C, H, W)
    in [0, 1], clean and with noise, and nearly its gradients; and what attacks find on it is judged by the network.
    """
    random = torch.Generator().manual_seed(0)
    noise = torch.rand(images.shape, generator=random).to(images.device) - 0.5
    try:
        twin = FrozenTwin(network, check=False).module
        use_matrix_products(twin)
        for probe in (images, (images + _PROBE * noise).clamp(0, 1)):
            expected, wanted = _logits_and_gradient(network, probe)
            found, gradient = _logits_and_gradient(twin, probe)
            # Rounding may switch a ReLU, so single entries of the gradient differ.
            same = torch.allclose(found, expected, rtol=0, atol=_ROUNDING * float(expected.abs().max()))
            if not same or (gradient - wanted).norm() > _KINKS * wanted.norm():
                return network
    except Exception:  # noqa: BLE001 - a network of others may refuse to be copied, in any way
        return network
    return twin


def _logits_and_gradient(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    images = images.clone().requires_grad_()
    with torch.enable_grad():
        logits = network(images).logits
        (gradient,) = torch.autograd.grad(logits.square().sum(), images)
    return logits.detach(), gradient


def as_pixels(images: Tensor, device: torch.device) -> Tensor:
    """Images as float32 in [0, 1] on the device; uint8 counts to 255."""
    images = images.to(device)
    return to_unit(images) if images.dtype == torch.uint8 else images.float()


@dataclass(frozen=True)
class Shard:
    """Images (N, C, H, W), uint8, labels and numbers in their set (N,), and networks on the device, in eval mode."""

    network: nn.Module
    surrogate: nn.Module | None
    images: Tensor
    labels: Tensor
    rows: IntArray
    device: torch.device

    def batches(self, size: int) -> Iterator[Batch]:
        """The images as float32 in [0, 1] on the device."""
        for images, labels in zip(self.images.split(size), self.labels.split(size), strict=True):
            yield Batch(as_pixels(images, self.device), labels.to(self.device))


class Measurement(Protocol):
    """Something measured shard by shard."""

    def run(self, shard: Shard) -> Arrays:
        """Measure one shard, maybe in a worker."""

    def merge(self, parts: Sequence[Arrays]) -> Any:
        """Put the shards together, in their order."""


class AutoAttackRun(NamedTuple):
    """How AutoAttack was run: version of the package's protocol, norm, radius, and the stages that ran, in order."""

    version: str
    norm: str
    epsilon: float
    stages: tuple[str, ...]


@dataclass(frozen=True)
class ShardOutcome:
    """Per-image results of attacks on N images, with their numbers in the test set and true classes (N,).

    `broken_at` is by attack, ``clean`` among them, (N,): 0 where the image is misclassified without an attack, r where
    the r-th restart (or the r-th of AutoAttack's ``ALL_STAGES``) broke it, `UNBROKEN` where none did. `left_out` has
    AutoAttack's stages that could not run on this network, and why; `warnings` its distinct warnings about it. `gate`
    marks the images set aside for the promotion gate (N,), `autoattack` is there if it was run. `per_image` has further
    arrays (N, ...) by name: ``predicted``, the class of the clean image, and what `adversarial_arrays` returns.
    """

    indices: IntArray
    labels: IntArray
    broken_at: dict[str, IntArray]
    left_out: dict[str, str] = field(default_factory=dict)
    autoattack: AutoAttackRun | None = None
    gate: BoolArray | None = None
    warnings: tuple[str, ...] = ()
    per_image: Arrays = field(default_factory=dict)

    def only(self, chosen: BoolArray | IntArray) -> Self:
        """The images that are chosen (N,), or those at some places (n,), in that order."""
        broken_at = {name: values[chosen] for name, values in self.broken_at.items()}
        gate = None if self.gate is None else self.gate[chosen]
        per_image = {name: values[chosen] for name, values in self.per_image.items()}
        indices, labels = self.indices[chosen], self.labels[chosen]
        return replace(self, indices=indices, labels=labels, broken_at=broken_at, gate=gate, per_image=per_image)

    def standing(self, attack: str, restarts: int | None = None) -> BoolArray:
        """Whether each image is still right under an attack, or its first restarts (N,); ConfigError if not run."""
        if attack not in self.broken_at:
            raise ConfigError("attack", attack, "was not run", f"choose from {', '.join(self.broken_at)}")
        broken_at = self.broken_at[attack]
        standing: BoolArray = broken_at == UNBROKEN
        return standing if restarts is None else standing | (broken_at > restarts)


def standing_under_all(outcome: ShardOutcome, transfer: ShardOutcome | None = None) -> BoolArray:
    """Whether each image is right when clean and under every attack (N,), bool, those of another outcome too."""
    standing: BoolArray = np.logical_and.reduce([outcome.standing(name) for name in outcome.broken_at])
    if transfer is not None:
        standing &= ~np.isin(outcome.indices, transfer.indices[~standing_under_all(transfer)])
    return standing


def joined_arrays(parts: Sequence[Arrays]) -> Arrays:
    """Arrays of all parts, which have the same names, part after part."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def merge_outcomes(outcomes: Sequence[ShardOutcome]) -> ShardOutcome:
    """Put shards that were attacked in the same way together, in the order of the test set."""
    merged = ShardOutcome(
        np.concatenate([outcome.indices for outcome in outcomes]),
        np.concatenate([outcome.labels for outcome in outcomes]),
        joined_arrays([outcome.broken_at for outcome in outcomes]),
        left_out={stage: why for outcome in outcomes for stage, why in outcome.left_out.items()},
        autoattack=next((outcome.autoattack for outcome in outcomes if outcome.autoattack is not None), None),
        warnings=tuple(dict.fromkeys(warning for outcome in outcomes for warning in outcome.warnings)),
        per_image=joined_arrays([outcome.per_image for outcome in outcomes]),
    )
    return merged.only(np.argsort(merged.indices))


def outcome_arrays(outcome: ShardOutcome) -> Arrays:
    """An outcome as plain arrays; :func:`outcome_from` is the inverse."""
    texts: dict[str, Any] = {"left_out": outcome.left_out, "warnings": outcome.warnings}
    if outcome.autoattack is not None:
        texts["autoattack"] = outcome.autoattack._asdict()
    arrays: Arrays = {"indices": outcome.indices, "labels": outcome.labels}
    arrays |= {f"broken_at/{name}": broken_at for name, broken_at in outcome.broken_at.items()}
    arrays |= {f"per_image/{name}": values for name, values in outcome.per_image.items()}
    arrays |= {name: np.array(json.dumps(value)) for name, value in texts.items()}
    return arrays if outcome.gate is None else arrays | {"gate": outcome.gate}


def outcome_from(arrays: Arrays) -> ShardOutcome:
    """The outcome that :func:`outcome_arrays` took apart; a missing array raises KeyError."""
    broken_at, per_image = (
        {name.removeprefix(kind): arrays[name] for name in arrays if name.startswith(kind)}
        for kind in ("broken_at/", "per_image/")
    )
    autoattack = None
    if "autoattack" in arrays:
        run = json.loads(str(arrays["autoattack"]))
        autoattack = AutoAttackRun(**run | {"stages": tuple(run["stages"])})
    left_out = json.loads(str(arrays["left_out"]))
    warnings = tuple(json.loads(str(arrays["warnings"])))
    indices, labels, gate = arrays["indices"], arrays["labels"], arrays.get("gate")
    return ShardOutcome(indices, labels, broken_at, left_out, autoattack, gate, warnings, per_image)


def save_arrays(arrays: Arrays, path: Path) -> None:
    """Write arrays as ``.npz``, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def load_arrays(path: Path) -> Arrays:
    """Read arrays that :func:`save_arrays` wrote; UnavailableError if there is no such file, or it is damaged."""
    with readable("shard", path, "delete it; it is made again"):
        return _arrays(path)


def _arrays(path: Path) -> Arrays:
    # Opened here, because numpy leaves the file of a damaged archive open.
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        return {name: file[name] for name in file}


def save_outcome(outcome: ShardOutcome, path: Path) -> None:
    """Write an outcome as ``.npz``, whole or not at all."""
    save_arrays(outcome_arrays(outcome), path)


def load_outcome(path: Path) -> ShardOutcome:
    """Read an outcome that :func:`save_outcome` wrote; UnavailableError if there is no such file, or it is damaged."""
    with readable("outcome", path, f"delete {path.parent} and give the same command again"):
        return outcome_from(_arrays(path))
