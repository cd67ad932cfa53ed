"""Checks of networks from outside this package, before any worker starts."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tla_service.config import RunConfig
from tla_service.data import Dataset
from tla_service.errors import ConfigError, UserError
from tla_service.models import Architecture, ImageClassifier
from tla_service.models.own_code import where
from tla_service.models.wrapped import WrappedClassifier, noise
from tla_service.training.adversary import layout_of

_SAME = 1e-4  # of the largest logit: rounding, which depends on the size of a batch


def check_network(config: RunConfig, architecture: Architecture, network: ImageClassifier, dataset: Dataset) -> None:
    """Raise UserError for a network that could not be trained, attacked or packaged; this package's own are known.

    On a copy, whose weights are moved a little, since some networks start with weights of zero.
    """
    if not isinstance(network, WrappedClassifier):
        return

    def bad(reason: str, remedy: str) -> ConfigError:
        return ConfigError("model.name", config.model.name, reason, remedy)

    architecture.requirements()
    for name, each in network.named_parameters():
        if each.is_floating_point() and each.dtype != torch.float32:
            kind = str(each.dtype).removeprefix("torch.")
            raise bad(f"{name.removeprefix('body.')} has type {kind}", "return a network with float32 parameters")
    layout = layout_of(config)
    images = noise(dataset.image_shape).to(memory_format=layout)
    labels = torch.arange(len(images)) % len(dataset.class_names)
    try:
        with torch.random.fork_rng(devices=[]):
            trial, random = copy.deepcopy(network).to(memory_format=layout), torch.Generator().manual_seed(0)
            with torch.no_grad():
                for weights in filter(torch.is_floating_point, trial.parameters()):
                    weights.add_(0.02 * torch.randn(weights.shape, generator=random, dtype=weights.dtype))
            _check_evaluation(trial, images, labels, bad)
            _check_training(trial.train(), images, labels, bad)
    except UserError:
        raise
    except Exception as error:
        in_place = "in-place" in str(error) or "inplace" in str(error)
        remedy = "do not change tensors in place" if in_place else "correct its forward method"
        if "view size is not compatible" in str(error):
            remedy = "use reshape in place of view, or leave training.channels_last out"
        raise bad(f"fails under attack or in training ({where(error)})", remedy) from error


def _check_evaluation(network: ImageClassifier, images: Tensor, labels: Tensor, bad: Any) -> None:
    """Eval mode: the same answer each time and for each image alone, and a gradient with respect to the images."""
    network.eval()
    given = images.clone().requires_grad_()
    logits = network(given).logits
    if not given.equal(images):
        raise bad("changes its images in place", "work on a copy, as x = x - mean does and x -= mean does not")
    if not torch.isfinite(logits).all():
        raise bad("returns numbers that are not finite in eval mode", "check its initial weights")
    scale = _SAME * logits.abs().max()
    if (network(given).logits - logits).abs().max() > scale:
        raise bad("returns other logits for the same images in eval mode", "draw nothing at random in eval mode")
    if (network(images[:1]).logits - logits[:1]).abs().max() > scale:
        reason = "returns other logits for an image alone than for the same image in a batch, in eval mode"
        raise bad(reason, "use BatchNorm with running statistics, or normalize each image by itself")
    gradient = None
    if logits.requires_grad:
        loss = nn.functional.cross_entropy(logits, labels)
        (gradient,) = torch.autograd.grad(loss, given, allow_unused=True)
    if gradient is None or not gradient.any():
        reason = "its logits have no gradient with respect to the images, so it cannot be attacked"
        raise bad(reason, "leave out argmax, rounding, detach() and no_grad() between images and logits")
    if not torch.isfinite(gradient).all():
        raise bad("the gradient with respect to the images is not finite", "look for sqrt, log or division at 0")
    if (logits >= 0).all() and torch.allclose(logits.sum(1), torch.ones(len(logits))):
        raise bad("returns probabilities", "return logits: leave out the softmax")


def _check_training(network: WrappedClassifier, images: Tensor, labels: Tensor, bad: Any) -> None:
    """Training mode: one tensor of logits, and a gradient for every parameter, which several workers need."""
    output = network.body(network.normalization(images))
    if not isinstance(output, Tensor):
        raise bad(f"returns {type(output).__name__} in training mode", "return one tensor of logits, in both modes")
    logits = network(images).logits
    nn.functional.cross_entropy(logits, labels).backward()
    unused = [name for name, each in network.named_parameters() if each.requires_grad and each.grad is None]
    if unused:
        name = unused[0].removeprefix("body.")
        reason = f"its logits do not depend on {name}" + (f" and {len(unused) - 1} more" if len(unused) > 1 else "")
        raise bad(reason, "remove parameters that are not used, or set their requires_grad to False")
