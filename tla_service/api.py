"""Accuracy under attack of any network, in one call; `tla_service` exports it."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tla_service import attacks as adversaries
from tla_service.attacks import Attack
from tla_service.config import RunConfig
from tla_service.config.adversary import EvaluationAttack
from tla_service.config.explain import validated
from tla_service.config.loading import load_config_file
from tla_service.config.radii import length_trouble
from tla_service.data import Batch, EvaluationBatches, load_dataset
from tla_service.errors import ConfigError
from tla_service.evaluation.shards import as_pixels, evaluating, logits_of
from tla_service.evaluation.suite import clean_logits, evaluation_attack, measure_accuracy
from tla_service.models import ModelOutput
from tla_service.registry.loading import load_with_folder
from tla_service.runtime import WorkerContext, mixed_seed
from tla_service.training.checkpoint import CODE
from tla_service.training.output import by_attack

_BATCH_SIZE = 500


def evaluate(
    model: nn.Module | str | Path,
    images: Any = None,
    labels: Any = None,
    *,
    attacks: Mapping[str, Attack] | None = None,
    config: RunConfig | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Measure the accuracy of a network on clean images and under attack, in eval mode and float32.

    `jobs/evaluate_tla.py` measures more: AutoAttack, confidence intervals, transfer, an audit for gradient masking.

    Args:
        model: Network from images (N, C, H, W) in [0, 1] to logits (N, K), on any device; or an address for
            `load_model`, such as a checkpoint folder.
        images: Tensor or array (N, C, H, W), float, in [0, 1]. Default: the test set of `config`.
        labels: True classes, integers (N,).
        attacks: Attacks by name. Default: `evaluation.test` of `config`.
        config: Run whose test set and attacks are the defaults; for a checkpoint folder, that of the checkpoint.
        seed: Seed of the random starts. Default: that of `config`, or 0.

    Returns:
        `clean_accuracy` and `robust_accuracy`: accuracy by attack, and `worst`, which counts an image as correct only
        if no attack breaks it. Fractions in [0, 1].

    Raises:
        ConfigError: An argument is missing or does not fit the others.
        UnavailableError: The model or the data cannot be read.
    """
    code = None  # of own attacks
    if isinstance(model, nn.Module):
        network, parameter = model, next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
    else:
        network, folder = load_with_folder(str(model))
        if config is None and (folder / "config.yaml").is_file():
            config = load_config_file(folder / "config.yaml")
            code = (folder / CODE).read_bytes() if (folder / CODE).is_file() else None
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network = network.to(device)
    if attacks:
        for name, attack in attacks.items():
            _check_attack(f"attacks.{name}", attack)
    elif attacks is None and config is not None:
        attacks = {
            name: evaluation_attack(attack, config.attack, config.data.name, f"evaluation.test.{name}", code)
            for name, attack in config.evaluation.test.items()
        }
    else:
        raise ConfigError("attacks", attacks, "not given", "pass attacks={'pgd20': Attack(...)}, or config")
    if "worst" in attacks:
        raise ConfigError("attacks.worst", None, "this name is reserved", "rename the attack")
    classifier, context = _Classifier(network), WorkerContext(device=device)
    batches = _batches(classifier, images, labels, config, context)
    if seed is None:
        seed = config.seed if config is not None else 0
    # The seed that training measures the test set with, so that a checkpoint gives the figures of its summary.
    return by_attack(measure_accuracy(classifier, batches, attacks, context, mixed_seed(seed, 3)))


def craft(network: Any, images: Any, labels: Any, attack: Attack, generator: torch.Generator | None = None) -> Tensor:
    """Attack images once, from one start. Neither the network's mode nor any `.grad` is touched.

    Args:
        network: Images (N, C, H, W) in [0, 1] to logits (N, K), or a network of `load_model`; in eval mode.
        images: Tensor or array (N, C, H, W), float, in [0, 1], on the network's device.
        labels: True classes, integers (N,).
        attack: The attack, of which restarts are left out.
        generator: Source of the random start, on the images' device.

    Returns:
        Adversarial images (N, C, H, W) in [0, 1], within `attack.epsilon` of `images`; detached.

    Raises:
        ConfigError: An argument is invalid.
    """
    _check_attack("attack", attack)
    images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    _check_images(images, labels)
    return adversaries.craft(logits_of(_Classifier(network)), images, labels.long(), attack, generator)


class _Classifier(nn.Module):
    """Wraps a network that may return logits alone."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> ModelOutput:
        output = self.network(images)
        if not isinstance(output, ModelOutput | Tensor):
            remedy = "wrap it in a module that returns them"
            raise ConfigError("model", type(output).__name__, "its output is not logits (N, K)", remedy)
        return output if isinstance(output, ModelOutput) else ModelOutput(output, output)


def _batches(
    classifier: nn.Module, images: Any, labels: Any, config: RunConfig | None, context: WorkerContext
) -> Iterable[Batch]:
    size = config.evaluation.batch_size if config is not None else _BATCH_SIZE
    if images is None and labels is None:
        if config is None:
            raise ConfigError("images", None, "not given", "pass images and labels, or config for its test set")
        source = load_dataset(config.data).test
        _check_network(classifier, source.fetch(torch.zeros(1, dtype=torch.int64)), source.labels, context.device)
        return EvaluationBatches(source, torch.arange(len(source)), context, batch_size=size)
    if images is None or labels is None:
        raise ConfigError("labels" if labels is None else "images", None, "not given", "pass images and labels")
    images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    _check_images(images, labels)
    _check_network(classifier, images[:1], labels, context.device)
    chunks = zip(images.float().split(size), labels.long().split(size), strict=True)
    return (Batch(some.to(context.device), classes.to(context.device)) for some, classes in chunks)


def _check_attack(where: str, attack: Attack) -> None:
    """Refuse what an attack of a configuration is refused for."""
    fields = {field: getattr(attack, field) for field in EvaluationAttack.model_fields}
    if attack.function is not None:
        fields["kind"] = "pgd"  # any name will do
    elif ":" in attack.kind:
        raise ConfigError(f"{where}.kind", attack.kind, "names a function here", "pass it: Attack(function=...)")
    try:
        validated(EvaluationAttack, fields)
    except ConfigError as found:
        raise ConfigError(f"{where}.{found.subject}", found.value, found.reason, found.remedy) from None
    step_size = None if attack.kind == "fgsm" else attack.step_size
    trouble = length_trouble(where, attack.norm, attack.epsilon, step_size, attack.num_steps)
    if trouble is not None:
        raise trouble


def _check_images(images: Tensor, labels: Tensor) -> None:
    shape = tuple(images.shape)
    if images.dim() != 4 or not len(images) or not images.is_floating_point():
        raise ConfigError("images", f"{shape} {images.dtype}", "not (N, C, H, W), float", "pass images in [0, 1]")
    low, high = images.aminmax()
    if not (low >= 0 and high <= 1):
        remedy = "divide 8-bit images by 255; normalize in the model"
        raise ConfigError("images", f"[{low:g}, {high:g}]", "outside [0, 1]", remedy)
    if labels.shape != shape[:1] or labels.is_floating_point() or labels.min() < 0:
        remedy = f"pass {len(images)} class indices, integers from 0"
        raise ConfigError("labels", f"{tuple(labels.shape)} {labels.dtype}", "not one class per image", remedy)


def _check_network(classifier: nn.Module, image: Tensor, labels: Tensor, device: torch.device) -> None:
    """Refuse a network without logits for images such as this one (1, C, H, W), or for all labels (N,)."""
    with evaluating(classifier):
        clean_logits(logits_of(classifier), as_pixels(image, device), labels)
