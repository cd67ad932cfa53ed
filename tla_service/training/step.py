"""One batch: attack, mine, loss, backward, optimiser. Every method goes this one way."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tla_service.config import RunConfig
from tla_service.data import Batch, StepBatch
from tla_service.models import ImageClassifier, ModelOutput
from tla_service.models.classifier import seen_by_triplets
from tla_service.runtime import WorkerContext, autocast, generator
from tla_service.training.adversary import Adversary, kept_buffers, moved_weights
from tla_service.training.roles import RoleForward, gather_rows, shard_sizes
from tla_service.training.terms import cross_entropy, divergence, runner_up, squared_distance
from tla_service.triplets import (
    LossTerms,
    Negatives,
    mine_hardest,
    mine_random,
    norm_penalty,
    pick_positives,
    triplet_hinge,
)

# What a step adds up, in this order; all but `images` are sums over images.
TOTALS = (
    "total",
    "cross_entropy",
    "triplet",
    "norm",
    "pairing",
    "correct",
    "active_triplets",
    "without_negative",
    "images",
)


_EVERYTHING_MIB = 2**20


@dataclass(frozen=True)
class Triplets:
    """Embeddings of a batch's triplets.

    Attributes:
        negatives: Negative of each anchor (N, D).
        valid: Whether the anchor has one (N,), as 0 and 1.
        positives: One (embeddings (N, D), margin) for each kind of positive in use.
    """

    negatives: Tensor
    valid: Tensor
    positives: tuple[tuple[Tensor, float], ...]


class TrainingStep:
    """Turns a batch into gradients.

    Args:
        network: The bare network, on the worker's device. Its frozen twin is attacked: no DDP wrapper, no parameter
            gradients, no BatchNorm updates.
        config: The run.
        context: This worker.
    """

    def __init__(self, network: ImageClassifier, config: RunConfig, context: WorkerContext) -> None:
        self.network, self.config, self.context = network, config, context
        seen = seen_by_triplets(network, config.loss.triplet_layer)
        self.wrapped: nn.Module = RoleForward(seen, together=config.training.batchnorm_roles == "together")
        if config.speed.tune_kernels:
            torch.backends.cudnn.benchmark = True
        if config.speed.compile == "all":
            self.wrapped = torch.compile(self.wrapped)  # type: ignore[assignment]
        if context.world_size > 1:
            devices = [context.device.index] if context.device.type == "cuda" else None
            # Buffers stay local between epochs and are averaged at their end (`fit`), which uses every worker's
            # statistics where a broadcast would throw all but rank 0's away, and costs nothing inside a step.
            ddp = nn.parallel.DistributedDataParallel
            renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # torch 2.14 and later
            local_buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
            # One bucket for everything is full, and sent, only when the backward pass has ended.
            bucket_mib = None if config.speed.overlap_reduction else _EVERYTHING_MIB
            self.wrapped = ddp(
                self.wrapped,
                device_ids=devices,
                gradient_as_bucket_view=True,
                bucket_cap_mb=bucket_mib,
                **local_buffers,
            )
        self.adversary = Adversary(seen, config, context)
        self._mined: Negatives | None = None  # hardest negatives of the batch last seen
        loss = config.loss
        default_clean_weight = 0.5 if config.method == "alp" else 0.0
        self.clean_weight = default_clean_weight if loss.clean_weight is None else loss.clean_weight
        # Terms that compare an image with its adversarial version, or look at it alone.
        self.needs_clean = (
            config.method == "alp"
            or config.robust_term != "cross_entropy"
            or bool(self.clean_weight or loss.embedding_match_weight)
        )

    def updates(self, batch: StepBatch, *seeds: int) -> Iterator[Tensor]:
        """Compute the gradients of each update that a batch leads to: one, or as many as free training replays it.

        The caller moves the weights between them, and clears the gradients.

        Args:
            batch: This worker's share of the step.
            *seeds: Numbers that fix this step's random draws.

        Yields:
            Sums as `backward` returns them.
        """
        if self.adversary.kind != "free" or self.config.method == "natural":
            yield self.backward(batch, *seeds)
            return
        random = generator(self.context.device, *seeds)
        images = batch.anchors.images
        perturbation = self.adversary.first_perturbation(images, random)
        for _ in range(self.config.attack.free_replays):
            adversarial = (images + perturbation).clamp(0, 1).requires_grad_()
            terms, totals = self.objective(batch, adversarial, random)
            terms.total.backward()
            yield totals
            assert adversarial.grad is not None
            perturbation = self.adversary.next_perturbation(perturbation, adversarial.grad)

    def backward(self, batch: StepBatch, *seeds: int) -> Tensor:
        """Compute the batch's loss and its gradients, averaged over workers.

        Args:
            batch: This worker's share of the step.
            *seeds: Numbers that fix this step's random draws.

        Returns:
            Sums over this worker's images, in the order of `TOTALS`: a float64 vector on the device.
        """
        random = generator(self.context.device, *seeds)
        adversarial = self._craft(batch.anchors, random)
        if not self.config.attack.awp:
            return self._descend(batch, adversarial, random)
        before = random.get_state()
        with kept_buffers(self.network):
            self._descend(batch, adversarial, random)
        # Both passes take one loss: the same adversarial images (Wu et al. 2020, algorithm 1), noise and negatives.
        # Negatives mined anew at the moved weights would make another loss than the one those weights ascended.
        random.set_state(before)
        with moved_weights(self.network, self.config.attack.awp_gamma):
            return self._descend(batch, adversarial, random, self._mined)

    def losses(self, batch: StepBatch, random: torch.Generator) -> tuple[LossTerms, Tensor]:
        """The batch's loss, with a graph, and the sums that `backward` returns."""
        return self.objective(batch, self._craft(batch.anchors, random), random)

    def objective(
        self, batch: StepBatch, adversarial: Tensor | None, random: torch.Generator, mined: Negatives | None = None
    ) -> tuple[LossTerms, Tensor]:
        """The loss on a batch whose adversarial images (N, C, H, W) are made; none for natural training.

        Args:
            batch: This worker's share of the step.
            adversarial: Its adversarial images.
            random: Source of noise and random negatives.
            mined: The hardest negatives of these images, if they have been mined before.
        """
        anchors = batch.anchors
        # DDP averages gradients over workers, whose shards may differ by one image: weighting each image by
        # world_size / global size makes that average the mean over the global batch (or, for `sum`, its sum).
        weight = float(self.context.world_size)
        if self.config.loss.reduction == "mean":
            weight /= batch.global_size
        if adversarial is None:
            (output,) = self._forward(anchors.images)
            return self._assemble(anchors, output, None, None, weight)
        if not self.config.mines_triplets:
            return self._without_triplets(anchors, adversarial, weight)
        if self.config.mining.pool == "batch":
            return self._mine_in_batch(batch, adversarial, random, weight, mined)
        return self._mine_in_pool(batch, adversarial, random, weight, mined)

    # ------------------------------------------------------------------------------------------------ the roles

    def _without_triplets(self, anchors: Batch, adversarial: Tensor, weight: float) -> tuple[LossTerms, Tensor]:
        """Without triplets the clean images go through the network only where a term uses them."""
        if not self.needs_clean:
            (output,) = self._forward(adversarial)
            return self._assemble(anchors, output, None, None, weight)
        output, clean = self._forward(adversarial, anchors.images)
        return self._assemble(anchors, output, clean, None, weight)

    def _mine_in_batch(
        self, batch: StepBatch, adversarial: Tensor, random: torch.Generator, weight: float, mined: Negatives | None
    ) -> tuple[LossTerms, Tensor]:
        """The cheap mode: one clean pass of the worker's own batch serves positives, pool and negatives."""
        anchors, mining = batch.anchors, self.config.mining
        clean_images = self._add_noise(anchors.images, random)
        output, clean = self._forward(adversarial, clean_images)
        rows = torch.arange(len(anchors.labels), device=self.context.device)
        pool, pool_labels = clean.embeddings, anchors.labels
        if mining.scope == "global":
            sizes = shard_sizes(batch.global_size, self.context.world_size)
            pool = gather_rows(pool, sizes, self.context)
            pool_labels = gather_rows(pool_labels, sizes, self.context)
            rows = rows + sum(sizes[: self.context.rank])
        mined = self._mine(output.embeddings, anchors.labels, pool, pool_labels, random, mined)
        same_class = None
        if mining.positives != "own":
            same_class = pool[pick_positives(anchors.labels, pool_labels, rows)]
        triplets = self._triplets(pool[mined.indices], mined.valid, clean.embeddings, same_class)
        return self._assemble(anchors, output, clean, triplets, weight)

    def _mine_in_pool(
        self, batch: StepBatch, adversarial: Tensor, random: torch.Generator, weight: float, mined: Negatives | None
    ) -> tuple[LossTerms, Tensor]:
        """The authors' way: mine in a separate draw with the network in eval mode, then embed the chosen negatives."""
        anchors, mining = batch.anchors, self.config.mining
        assert batch.pool is not None
        pool_images, pool_labels = batch.pool.images, batch.pool.labels
        queries = self.adversary.last_embeddings if mining.queries == "last_step" else self.adversary.embed(adversarial)
        assert queries is not None
        pool = self.adversary.embed(pool_images)
        if mining.scope == "global":
            sizes = [len(pool)] * self.context.world_size
            pool, pool_labels = (gather_rows(rows, sizes, self.context) for rows in (pool, pool_labels))
            # The chosen images are embedded again, with a graph, by the worker that uses them.
            pool_images = gather_rows(pool_images, sizes, self.context)
        mined = self._mine(queries, anchors.labels, pool, pool_labels, random, mined)
        noise_on_all = mining.clean_noise_on == "all"
        negatives = self._add_noise(pool_images[mined.indices], random, apply=noise_on_all)
        roles = [adversarial, negatives]
        needs_own = mining.positives != "same_class" or self.needs_clean
        if needs_own:
            roles.append(self._add_noise(anchors.images, random))
        if mining.positives != "own":
            assert batch.positives is not None
            roles.append(self._add_noise(batch.positives.images, random, apply=noise_on_all))
        output, negative, *others = self._forward(*roles)
        clean = others.pop(0) if needs_own else None
        own = clean.embeddings if clean is not None else None
        same_class = others[0].embeddings if others else None
        triplets = self._triplets(negative.embeddings, mined.valid, own, same_class)
        return self._assemble(anchors, output, clean, triplets, weight)

    # ------------------------------------------------------------------------------------------------ the parts

    def _forward(self, *roles: Tensor) -> tuple[ModelOutput, ...]:
        with autocast(self.config.training.precision, self.context.device):
            outputs: tuple[ModelOutput, ...] = self.wrapped(*roles)
        return outputs

    def _craft(self, anchors: Batch, random: torch.Generator) -> Tensor | None:
        return None if self.config.method == "natural" else self.adversary.craft(anchors, random)

    def _descend(
        self,
        batch: StepBatch,
        adversarial: Tensor | None,
        random: torch.Generator,
        mined: Negatives | None = None,
    ) -> Tensor:
        terms, totals = self.objective(batch, adversarial, random, mined)
        terms.total.backward()
        return totals

    def _mine(
        self,
        anchors: Tensor,
        labels: Tensor,
        pool: Tensor,
        pool_labels: Tensor,
        random: torch.Generator,
        mined: Negatives | None,
    ) -> Negatives:
        mining = self.config.mining
        if self.config.method == "tla_rn":
            return mine_random(labels, pool_labels, random, any_class=mining.random_negatives == "any")
        keep = None
        if mining.keep_probability < 1:
            draw = torch.rand(len(labels), len(pool_labels), generator=random, device=labels.device)
            keep = draw < mining.keep_probability
        if mined is None:  # only now: the noise drawn next is the same either way
            absolute = mining.similarity == "absolute_cosine"
            mined = mine_hardest(anchors, labels, pool.detach(), pool_labels, absolute=absolute, keep=keep)
        self._mined = mined
        return mined

    def _add_noise(self, images: Tensor, random: torch.Generator, *, apply: bool = True) -> Tensor:
        """Uniform noise on clean images, after the attack (Mao et al. 2019, appendix C)."""
        mining = self.config.mining
        if not (apply and mining.clean_noise):
            return images
        noise = torch.rand(images.shape, generator=random, device=images.device, dtype=images.dtype)
        noisy = images + (2 * noise - 1) * mining.clean_noise
        noisy = (noisy * 255).round() / 255 if mining.clean_noise_round else noisy
        return noisy.clamp(0, 1)

    def _triplets(self, negatives: Tensor, valid: Tensor, own: Tensor | None, same_class: Tensor | None) -> Triplets:
        loss, kinds = self.config.loss, self.config.mining.positives
        positives: list[tuple[Tensor, float]] = []
        if kinds != "same_class" and own is not None:
            positives.append((own, loss.margin * loss.own_margin_scale))
        if same_class is not None:
            positives.append((same_class, loss.margin))
        return Triplets(negatives, valid, tuple(positives))

    def _assemble(
        self, anchors: Batch, output: ModelOutput, clean: ModelOutput | None, triplets: Triplets | None, weight: float
    ) -> tuple[LossTerms, Tensor]:
        """Put the terms together, image by image, then weight and sum them."""
        loss, labels = self.config.loss, anchors.labels
        label_term, pairing = self._label_term(output, clean, labels)
        none = torch.zeros_like(label_term)
        triplet, norm, active, valid = none, none, none, torch.ones_like(none)
        if triplets is not None:
            valid = triplets.valid.to(none.dtype)
            for positives, margin in triplets.positives:
                pair = (output.embeddings, positives)
                anchor, positive = reversed(pair) if self.config.method == "tla_sa" else pair
                hinge = triplet_hinge(anchor, positive, triplets.negatives, margin) * valid
                triplet, active = triplet + hinge, active + (hinge > 0)
                norm = norm + norm_penalty((anchor, positive, triplets.negatives), loss.norm_form) * valid
        # The code multiplies lambda_1 into the norm term as well; the paper does not.
        norm_weight = loss.norm_weight * (loss.triplet_weight if loss.norm_form == "mean_squares" else 1.0)
        total = label_term + loss.triplet_weight * triplet + norm_weight * norm + pairing
        correct = output.logits.argmax(1) == labels
        with torch.no_grad():
            columns = (total, label_term, triplet, norm, pairing, correct, active, 1 - valid, torch.ones_like(none))
            totals = torch.stack([column.double().sum() for column in columns])
        terms = LossTerms(*(weight * values.sum() for values in (total, label_term, triplet, norm, pairing)))
        return terms, totals

    def _label_term(self, output: ModelOutput, clean: ModelOutput | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The term on labels, and what pairs clean with adversarial images, (N,) each."""
        loss, smoothing, kind = self.config.loss, self.config.loss.label_smoothing, self.config.robust_term
        adversarial_term = cross_entropy(output.logits, labels, smoothing)
        pairing = torch.zeros_like(adversarial_term)
        if clean is None:
            return adversarial_term, pairing
        if loss.embedding_match_weight:
            pairing = pairing + loss.embedding_match_weight * squared_distance(output.embeddings, clean.embeddings)
        if kind == "cross_entropy" and not (self.clean_weight or self.config.method == "alp"):
            return adversarial_term, pairing
        clean_term = cross_entropy(clean.logits, labels, smoothing)
        if kind == "trades":
            return clean_term, pairing + self.config.robust_weight * divergence(clean.logits, output.logits)
        if kind == "mart":
            doubt = 1 - (-cross_entropy(clean.logits, labels)).exp()
            paired = self.config.robust_weight * divergence(clean.logits, output.logits) * doubt
            return adversarial_term + runner_up(output.logits, labels), pairing + paired
        if self.config.method == "alp":
            pairing = pairing + loss.logit_pairing_weight * squared_distance(output.logits, clean.logits)
        return (1 - self.clean_weight) * adversarial_term + self.clean_weight * clean_term, pairing
