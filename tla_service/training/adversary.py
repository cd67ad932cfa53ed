"""The adversary of training: adversarial images and adversarial weights."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tla_service.attacks import Attack, LogitsFn, climb, craft, craft_noisy_step, starting_point
from tla_service.config import RunConfig
from tla_service.data import Batch
from tla_service.errors import one_line
from tla_service.models import ModelOutput
from tla_service.models.frozen import FrozenTwin
from tla_service.models.own_code import load_function
from tla_service.runtime import WorkerContext, autocast, generator
from tla_service.training.cuda_graph import GraphedClimb

_MOST_MOVED = 0.1  # share of pixels that a graph may move elsewhere than eager execution
_log = logging.getLogger(__name__)


class Adversary:
    """Crafts adversarial images of a batch, and embeds images in eval mode.

    It attacks a frozen twin of the bare network: no communication, no parameter gradients, no BatchNorm updates.
    """

    def __init__(
        self, network: nn.Module, config: RunConfig, context: WorkerContext, code: bytes | None = None
    ) -> None:
        self._network, self._config, self._context = network, config, context
        self._full = self.attack = training_attack(config, code)
        self.kind = config.attack.kind  # pgd after a collapse of single-step training with attack.on_collapse=pgd
        # (N, D), of the images before the last attack's last step, without a graph.
        self.last_embeddings: Tensor | None = None
        narrow = torch.bfloat16 if config.training.precision == "bfloat16" else None
        self._twin = FrozenTwin(network, fold_batchnorm=config.speed.fold_batchnorm, weights_dtype=narrow)
        self._refreshed = False  # since the last update of the network
        self._run: Callable[[Tensor], ModelOutput] = self._twin
        if config.speed.compile != "none":
            self._run = torch.compile(self._twin.module)
        self._graphs: dict[torch.Size, tuple[GraphedClimb, Tensor | None]] = {}  # with the `last_embeddings` of each
        self._refused_graphs = False

    def prepare(self, *shapes: tuple[int, ...]) -> None:
        """Capture the attack on batches of these shapes (N, C, H, W), so that no training step waits for it.

        Graphs that cannot be captured, or compute something else, are not used; the log says so.
        """
        if not self.uses_graphs:
            return
        self._twin.refresh()
        device, layout = self._context.device, layout_of(self._config)
        for shape in shapes:
            draws = generator(device, self._config.seed)
            images = torch.rand(shape, generator=draws, device=device).contiguous(memory_format=layout)
            batch = Batch(images, torch.zeros(shape[0], dtype=torch.int64, device=device))
            start = starting_point(images, self._full, draws)
            try:
                found = self._graph(batch)[0](batch, start, self._full)
            except RuntimeError as error:
                self._refuse_graphs(one_line(error))
                return
            expected = climb(partial(self._logits, self._run), images, start, batch.labels, self._full)
            # Rounding may turn the sign of a gradient near zero, and moves those pixels alone.
            moved = float(((found - expected).abs() > self._full.step_size / 2).float().mean())
            if moved > _MOST_MOVED:
                self._refuse_graphs(f"{moved:.0%} of the pixels differ from those of eager execution")
                return

    def _refuse_graphs(self, reason: str) -> None:
        self._refused_graphs = True
        self._graphs.clear()
        _log.warning("The attack runs without CUDA graphs: %s", reason)

    def grow(self, done: float) -> None:
        """Set the radius for a share of the run; it grows linearly until `attack.warmup`."""
        share = min(1.0, done / self._config.attack.warmup) if self._config.attack.warmup else 1.0
        self.attack = replace(self._full, epsilon=share * self._full.epsilon, step_size=share * self._full.step_size)

    def craft(self, anchors: Batch, random: torch.Generator) -> Tensor:
        """Adversarial images (N, C, H, W) of a batch, detached."""
        if self._config.attack.batchnorm == "train":
            with restored(self._network.buffers()):
                return self._make(partial(self._logits, self._network), anchors, random)
        self._twin.refresh()
        self._refreshed = True
        if not self.uses_graphs:
            return self._make(partial(self._logits, self._run), anchors, random)
        graph, self.last_embeddings = self._graph(anchors)
        return graph(anchors, starting_point(anchors.images, self.attack, random), self.attack)

    def embed(self, *images: Tensor) -> list[Tensor]:
        """Embeddings (N, D) of each batch of images in eval mode, without a graph."""
        if not self._refreshed:
            self._twin.refresh()
        self._refreshed = False  # the network is updated next
        with torch.no_grad(), autocast(self._config.training.precision, self._context.device):
            return [self._run(each).embeddings for each in images]

    def _make(self, logits_fn: LogitsFn, anchors: Batch, random: torch.Generator) -> Tensor:
        if self.kind == "n_fgsm":
            noise = self._config.attack.noise
            return craft_noisy_step(logits_fn, anchors.images, anchors.labels, self.attack, noise, random)
        return craft(logits_fn, anchors.images, anchors.labels, self.attack, random)

    @property
    def uses_graphs(self) -> bool:
        """Whether the attack is replayed as CUDA graphs."""
        config = self._config
        possible = config.method != "natural" and config.attack.batchnorm != "train" and self.kind == "pgd"
        return bool(config.speed.cuda_graphs) and possible and not self._refused_graphs

    def _graph(self, batch: Batch) -> tuple[GraphedClimb, Tensor | None]:
        """The graph for batches of this shape; an epoch has two shapes at most."""
        shape = batch.images.shape
        if shape not in self._graphs:
            graph = GraphedClimb(partial(self._logits, self._run), batch, self._full)
            self._graphs[shape] = graph, self.last_embeddings
        return self._graphs[shape]

    def _logits(self, run: Callable[[Tensor], ModelOutput], images: Tensor) -> Tensor:
        with autocast(self._config.training.precision, self._context.device):
            output = run(images)
        self.last_embeddings = output.embeddings.detach()
        return output.logits


def layout_of(config: RunConfig) -> torch.memory_format:
    """Memory format of the network's weights and of the images it gets."""
    return torch.channels_last if config.training.channels_last else torch.contiguous_format


def training_attack(config: RunConfig, code: bytes | None = None) -> Attack:
    """The PGD of the training loop (Mao et al. 2019, section 2; cross-entropy only, never the triplet term).

    Or the user's own attack; `code` is what `load_function` takes.
    """
    attack = config.attack
    same = attack.model_dump(include={"norm", "epsilon", "step_size", "num_steps", "random_start"})
    smoothing = config.loss.label_smoothing if attack.label_smoothing else 0.0
    made = Attack(**same, label_smoothing=smoothing, objective=config.attack_objective)
    if ":" not in attack.kind:
        return made
    return replace(made, kind=attack.kind, function=load_function("attack.kind", attack.kind, code))


@contextlib.contextmanager
def moved_weights(network: nn.Module, gamma: float) -> Iterator[None]:
    """Adversarial weights (Wu et al. 2020, equation 8 with one step): every kernel up its gradient by gamma norms.

    The parameters hold gradients of the loss, which are cleared. The weights are restored afterwards, bit for bit:
    gradients taken inside update the original weights. BatchNorm's scales and biases stay, as in the authors' code.
    """
    kernels = [p for p in network.parameters() if p.ndim > 1 and p.grad is not None]
    with restored(kernels):
        with torch.no_grad():
            for kernel in kernels:
                assert kernel.grad is not None
                length = kernel.grad.norm().clamp_min(torch.finfo(kernel.dtype).tiny)
                kernel.add_(kernel.grad * (gamma * kernel.norm() / length))
        network.zero_grad(set_to_none=True)
        yield


@contextlib.contextmanager
def restored(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the values of tensors afterwards, such as BatchNorm's buffers after a forward pass in train mode."""
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)


@contextlib.contextmanager
def statistics_kept(network: nn.Module) -> Iterator[None]:
    """BatchNorm in train mode normalizes by the batch as ever, but leaves its running statistics alone."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
