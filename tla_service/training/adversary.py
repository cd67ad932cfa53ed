"""The adversary that training meets: which images it makes, and how it moves weights."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tla_service.attacks import Attack, craft, craft_noisy_step
from tla_service.config import RunConfig
from tla_service.data import Batch
from tla_service.runtime import WorkerContext, autocast


class Adversary:
    """Makes adversarial images of a batch.

    Args:
        network: The bare network. It is attacked as it is: no DDP wrapper, no parameter gradients, no BatchNorm
            updates.
        config: The run.
        context: This worker.

    Attributes:
        kind: As configured; `pgd` once single-step training has collapsed and `attack.on_collapse` says so.
    """

    def __init__(self, network: nn.Module, config: RunConfig, context: WorkerContext) -> None:
        self._network, self._config, self._context = network, config, context
        self._attack = training_attack(config)
        self.kind = config.attack.kind

    def craft(self, anchors: Batch, random: torch.Generator) -> Tensor:
        """Adversarial images (N, C, H, W) of the batch's, detached."""
        precision, device = self._config.training.precision, self._context.device

        def logits_fn(images: Tensor) -> Tensor:
            with autocast(precision, device):
                logits: Tensor = self._network(images).logits
            return logits

        keeping = kept_buffers if self._config.attack.batchnorm == "train" else in_eval_mode
        with keeping(self._network):
            if self.kind == "n_fgsm":
                noise = self._config.attack.noise
                return craft_noisy_step(logits_fn, anchors.images, anchors.labels, self._attack, noise, random)
            return craft(logits_fn, anchors.images, anchors.labels, self._attack, random)

    def first_perturbation(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Where free training starts on a batch: uniform in the ball, (N, C, H, W)."""
        draw = torch.rand(images.shape, generator=random, device=images.device, dtype=images.dtype)
        return (2 * draw - 1) * self._attack.epsilon

    def next_perturbation(self, perturbation: Tensor, gradient: Tensor) -> Tensor:
        """Free training's ascent: a step of epsilon along the update's own gradient to the images, back in the ball."""
        epsilon = self._attack.epsilon
        return (perturbation + epsilon * gradient.sign()).clamp(-epsilon, epsilon)


def training_attack(config: RunConfig) -> Attack:
    """The PGD of the training loop (Mao et al. 2019, section 2; cross-entropy only, never the triplet term)."""
    attack = config.attack
    return Attack(
        norm=attack.norm,
        epsilon=attack.epsilon,
        step_size=attack.step_size,
        num_steps=attack.num_steps,
        random_start=attack.random_start,
        label_smoothing=config.loss.label_smoothing if attack.label_smoothing else 0.0,
        objective=config.attack_objective,
    )


@contextlib.contextmanager
def moved_weights(network: nn.Module, gamma: float) -> Iterator[None]:
    """Adversarial weights (Wu et al. 2020, equation 8 with one step): every kernel up its gradient by gamma norms.

    Args:
        network: With gradients of the loss in its parameters; they are dropped.
        gamma: Length of the move, as a share of the kernel's own norm.

    The weights are put back afterwards, bit for bit: gradients taken inside move the original weights. BatchNorm's
    scales and biases stay, as in the authors' code.
    """
    kernels = [p for p in network.parameters() if p.ndim > 1 and p.grad is not None]
    saved = [kernel.detach().clone() for kernel in kernels]
    with torch.no_grad():
        for kernel in kernels:
            assert kernel.grad is not None
            length = kernel.grad.norm().clamp_min(torch.finfo(kernel.dtype).tiny)
            kernel.add_(kernel.grad * (gamma * kernel.norm() / length))
    network.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        with torch.no_grad():
            for kernel, value in zip(kernels, saved, strict=True):
                kernel.copy_(value)


@contextlib.contextmanager
def in_eval_mode(network: nn.Module) -> Iterator[None]:
    """Eval mode for a while: BatchNorm uses its running statistics and leaves them alone."""
    network.eval()
    try:
        yield
    finally:
        network.train()


@contextlib.contextmanager
def kept_buffers(network: nn.Module) -> Iterator[None]:
    """Put the network's buffers back afterwards: a forward pass in train mode moves BatchNorm's."""
    saved = [buffer.clone() for buffer in network.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(network.buffers(), saved, strict=True):
                buffer.copy_(value)
