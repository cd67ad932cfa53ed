"""One batch: attack, mine, loss, gradients. Every method shares this code."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tla_service.config import RunConfig
from tla_service.data import Batch, StepBatch
from tla_service.data.order import shard_sizes
from tla_service.models import ImageClassifier, ModelOutput
from tla_service.models.classifier import seen_by_triplets
from tla_service.runtime import WorkerContext, autocast, gather_rows, generator, mixed_seed, uniform_noise
from tla_service.training.adversary import Adversary, moved_weights, restored, statistics_kept
from tla_service.training.own import load_miner, load_term
from tla_service.training.roles import RoleForward, Roles
from tla_service.training.terms import cross_entropy, divergence, runner_up, squared_distance
from tla_service.triplets import Negatives, mine_hardest, mine_random, norm_penalty, pick_positives, triplet_hinge

TOTALS = (
    "loss", "cross_entropy", "triplet", "norm", "pairing", "adversarial_accuracy", "active_triplets",
    "without_negative", "images",
)  # fmt: skip
"""What a step adds up over its images, in this order; the user's own loss terms come before the last."""
_EVERYTHING_MIB = 2**20
_VIEW, _CUTMIX = 1, 2  # last part of the seeds of their draws
_View = tuple[Batch, Tensor | None]  # the second view, and its adversarial images; None for natural training


class TrainingStep:
    """Turns a batch into gradients of the bare network, which is on the worker's device."""

    def __init__(
        self, network: ImageClassifier, config: RunConfig, context: WorkerContext, code: bytes | None = None
    ) -> None:
        self.network, self.config, self.context = network, config, context
        seen = seen_by_triplets(network, config.loss.triplet_layer)
        self.wrapped: nn.Module = RoleForward(seen, together=config.training.batchnorm_roles == "together")
        torch.backends.cudnn.benchmark = config.speed.tune_kernels
        torch.backends.cudnn.allow_tf32 = config.speed.mode != "exact"
        if config.speed.compile == "all":
            self.wrapped = torch.compile(self.wrapped)  # type: ignore[assignment]
        if context.world_size > 1:
            # Buffers stay local between epochs and are averaged at their end, which uses every worker's
            # statistics where a broadcast would drop all but rank 0's, and costs nothing inside a step.
            ddp = nn.parallel.DistributedDataParallel
            renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # torch 2.14 and later
            options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
            options["device_ids"] = [context.device.index] if context.device.type == "cuda" else None
            # A single bucket is full, and sent, only when the backward pass has ended.
            options["bucket_cap_mb"] = None if config.speed.overlap_reduction else _EVERYTHING_MIB
            self.wrapped = ddp(self.wrapped, gradient_as_bucket_view=True, **options)
        self.adversary = Adversary(seen, config, context, code)
        self._extra = {path: (load_term(path, code), weight) for path, weight in config.loss.extra.items()}
        self._own_miner = load_miner(config.mining.miner, code) if config.mining.miner else None
        self._mined: Negatives | None = None  # hardest negatives of the last batch
        self._drawn = torch.empty(0)  # the generator's state behind an own miner
        loss, pairs_logits = config.loss, config.method == "alp"
        self.clean_weight = 0.5 * pairs_logits if loss.clean_weight is None else loss.clean_weight
        # Terms that compare an image with its adversarial version, or use the clean image alone.
        own_term = pairs_logits or config.robust_term != "cross_entropy"
        self.needs_clean = own_term or bool(self.clean_weight or loss.embedding_match_weight or loss.extra)

    def updates(self, batch: StepBatch, *seeds: int) -> Iterator[Tensor]:
        """`backward` for each update, which the caller makes, on a batch: once, or once per replay of free training."""
        if self.adversary.kind != "free" or self.config.method == "natural":
            yield self.backward(batch, *seeds)
            return
        batch = self._prepared(batch, *seeds)
        random = generator(self.context.device, *seeds)
        images, epsilon = batch.anchors.images, self.adversary.attack.epsilon
        perturbation = uniform_noise(images, epsilon, random)
        for _ in range(self.config.attack.free_replays):
            adversarial = (images + perturbation).clamp(0, 1).requires_grad_()
            yield self._descend(batch, adversarial, random)
            assert adversarial.grad is not None
            perturbation = (perturbation + epsilon * adversarial.grad.sign()).clamp(-epsilon, epsilon)

    def backward(self, batch: StepBatch, *seeds: int) -> Tensor:
        """Compute the gradients of the loss on this worker's share of a step, averaged over workers.

        Returns sums over its images, in the order of `TOTALS`: float64, on the device.
        """
        batch = self._prepared(batch, *seeds)
        random = generator(self.context.device, *seeds)
        view: _View | None = None
        if batch.view is not None:  # before the anchors, whose last embeddings mining may read
            view = batch.view, self._attacked(batch.view, generator(self.context.device, *seeds, _VIEW))
        adversarial = self._attacked(batch.anchors, random)
        if not self.config.attack.awp:
            return self._descend(batch, adversarial, random, view=view)
        before = random.get_state()
        # The weights ascend the loss of the first view alone, as in DAJAT's code.
        with restored(self.network.buffers()):
            self._descend(batch, adversarial, random)
        # Both passes take the same loss: adversarial images (Wu et al. 2020, algorithm 1), noise and negatives.
        # Negatives mined again at the moved weights would make another loss than the one those weights ascended.
        random.set_state(before)
        with moved_weights(self.network, self.config.attack.awp_gamma):
            return self._descend(batch, adversarial, random, self._mined, view=view)

    def _attacked(self, batch: Batch, random: torch.Generator) -> Tensor | None:
        return None if self.config.method == "natural" else self.adversary.craft(batch, random)

    def _prepared(self, batch: StepBatch, *seeds: int) -> StepBatch:
        """The batch, cut and mixed if asked, in the network's memory format: once, not by every attack step."""
        if self.config.data.cutmix:
            from tla_service.data.strong import cut_and_mix  # slow to import

            whole, classes = batch.view or batch.anchors, self.network.classifier.out_features
            mixed = Batch(*cut_and_mix(whole.images, whole.labels, classes, mixed_seed(*seeds, _CUTMIX)))
            batch = replace(batch, anchors=mixed) if batch.view is None else replace(batch, view=mixed)
        if not self.config.training.channels_last:
            return batch

        def convert(part: Batch) -> Batch:
            return Batch(part.images.contiguous(memory_format=torch.channels_last), part.labels)

        positives, pool, view = (part and convert(part) for part in (batch.positives, batch.pool, batch.view))
        return replace(batch, anchors=convert(batch.anchors), positives=positives, pool=pool, view=view)

    def _descend(
        self,
        batch: StepBatch,
        adversarial: Tensor | None,
        random: torch.Generator,
        mined: Negatives | None = None,
        view: _View | None = None,
    ) -> Tensor:
        # With a second view, gradients are reduced across workers once, in its backward pass.
        both = view is not None and isinstance(self.wrapped, nn.parallel.DistributedDataParallel)
        with self.wrapped.no_sync() if both else contextlib.nullcontext():  # type: ignore[operator]
            loss, totals = self.objective(batch, adversarial, random, mined)
            loss.backward()
        if view is not None:
            loss, own = self._view_objective(batch, view)
            loss.backward()
            totals[0] += own
        return totals

    def _view_objective(self, batch: StepBatch, view: _View) -> tuple[Tensor, Tensor]:
        """The second view's part of the loss and of its sum: no triplets, nothing for BatchNorm's averages."""
        clean, adversarial = view
        roles = [clean.images] if adversarial is None else [adversarial, clean.images][: 1 + self.needs_clean]
        with statistics_kept(self.network):
            attacked, *others = self._forward(*roles)
        label_term, pairing = self._label_term(attacked, others[0] if others else None, clean.labels)
        total = self.config.loss.view_weight * (label_term + pairing)
        total = total if batch.weights is None else total * batch.weights
        return self._weight(batch) * total.sum(), total.detach().double().sum()

    def objective(
        self, batch: StepBatch, adversarial: Tensor | None, random: torch.Generator, mined: Negatives | None = None
    ) -> tuple[Tensor, Tensor]:
        """The loss on this worker's share of a step, a scalar with a graph, and the sums that `backward` returns.

        The adversarial images (N, C, H, W) are None for natural training, the negatives if not mined before.
        """
        clean = batch.anchors.images
        if adversarial is None:
            roles = Roles(self._forward(clean)[0])
        elif self.config.mines_triplets:
            mine = self._mine_in_batch if self.config.mining.pool == "batch" else self._mine_in_pool
            roles = mine(batch, adversarial, random, mined)
        else:
            attacked, *others = self._forward(adversarial, *([clean] if self.needs_clean else []))
            roles = Roles(attacked, others[0] if others else None)
        return self._loss(roles, batch)

    def _mine_in_batch(
        self, batch: StepBatch, adversarial: Tensor, random: torch.Generator, mined: Negatives | None
    ) -> Roles:
        """The cheap mode: one clean pass of the worker's own batch serves positives, pool and negatives."""
        labels, mining = batch.anchors.labels, self.config.mining
        output, clean = self._forward(adversarial, self._add_noise(batch.anchors.images, random))
        rows = torch.arange(len(labels), device=self.context.device)
        pool, pool_labels = clean.embeddings, labels
        if mining.scope == "global":
            sizes = shard_sizes(batch.global_size, self.context.world_size, self.config.extra_per_step)
            pool, pool_labels = (gather_rows(own, sizes, self.context) for own in (pool, pool_labels))
            rows = rows + sum(sizes[: self.context.rank])
        mined = self._mine(random, mined, labels, pool_labels, lambda: (output.embeddings, pool))
        same_class = None if mining.positives == "own" else pool[pick_positives(labels, pool_labels, rows)]
        return Roles(output, clean, pool[mined.indices], mined.valid, same_class)

    def _mine_in_pool(
        self, batch: StepBatch, adversarial: Tensor, random: torch.Generator, mined: Negatives | None
    ) -> Roles:
        """The authors' mode: mine in a separate draw with the network in eval mode, then embed the chosen negatives."""
        anchors, drawn, mining = batch.anchors, batch.pool, self.config.mining
        assert drawn is not None

        def gathered(rows: Tensor) -> Tensor:
            sizes = [len(rows)] * self.context.world_size
            return gather_rows(rows, sizes, self.context) if mining.scope == "global" else rows

        def embedded() -> tuple[Tensor, Tensor]:
            if mining.queries == "last_step":
                (pool,), queries = self.adversary.embed(drawn.images), self.adversary.last_embeddings
            else:
                queries, pool = self.adversary.embed(adversarial, drawn.images)
            assert queries is not None
            return queries, gathered(pool)

        # The worker that uses the chosen images embeds them again, with a graph.
        pool_images, pool_labels = gathered(drawn.images), gathered(drawn.labels)
        mined = self._mine(random, mined, anchors.labels, pool_labels, embedded)
        noise_on_all = mining.clean_noise_on == "all"
        images = [adversarial, self._add_noise(pool_images[mined.indices], random, apply=noise_on_all)]
        needs_own = mining.positives != "same_class" or self.needs_clean
        if needs_own:
            images.append(self._add_noise(anchors.images, random))
        if mining.positives != "own":
            assert batch.positives is not None
            images.append(self._add_noise(batch.positives.images, random, apply=noise_on_all))
        output, negative, *others = self._forward(*images)
        clean = others.pop(0) if needs_own else None
        return Roles(output, clean, negative.embeddings, mined.valid, others[0].embeddings if others else None)

    def _forward(self, *images: Tensor) -> tuple[ModelOutput, ...]:
        with autocast(self.config.training.precision, self.context.device):
            return self.wrapped(*images)

    def _mine(
        self,
        random: torch.Generator,
        mined: Negatives | None,
        labels: Tensor,
        pool_labels: Tensor,
        embedded: Callable[[], tuple[Tensor, Tensor]],
    ) -> Negatives:
        """Negatives for anchors of these labels, unless mined before; `embedded` gives the anchors and the pool."""
        mining = self.config.mining
        if self.config.method == "tla_rn":
            return mine_random(labels, pool_labels, random, any_class=mining.random_negatives == "any")
        keep = None
        if mining.keep_probability < 1:
            draw = torch.rand(len(labels), len(pool_labels), generator=random, device=labels.device)
            keep = draw < mining.keep_probability
        if mined is not None:
            if self._own_miner is not None:
                random.set_state(self._drawn)  # it may have drawn: both passes draw the same noise next
            return mined
        anchors, pool = embedded()
        if self._own_miner is not None:
            mined = self._own_miner(anchors, labels, pool, pool_labels, random)
            self._drawn = random.get_state()
        else:
            absolute = mining.similarity == "absolute_cosine"
            mined = mine_hardest(anchors, labels, pool.detach(), pool_labels, absolute=absolute, keep=keep)
        self._mined = mined
        return mined

    def _add_noise(self, images: Tensor, random: torch.Generator, *, apply: bool = True) -> Tensor:
        """Uniform noise on clean images, after the attack (Mao et al. 2019, appendix C)."""
        mining = self.config.mining
        if not (apply and mining.clean_noise):
            return images
        noisy = images + uniform_noise(images, mining.clean_noise, random)
        noisy = (noisy * 255).round() / 255 if mining.clean_noise_round else noisy
        return noisy.clamp(0, 1)

    def _loss(self, roles: Roles, batch: StepBatch) -> tuple[Tensor, Tensor]:
        loss, labels, output = self.config.loss, batch.anchors.labels, roles.attacked
        label_term, pairing = self._label_term(output, roles.clean, labels)
        if batch.weights is not None:
            label_term, pairing = label_term * batch.weights, pairing * batch.weights
        none = torch.zeros_like(label_term)
        triplet, norm, active, valid = none, none, none, torch.ones_like(none)
        if roles.negatives is not None and roles.valid is not None:
            valid = roles.valid.to(none.dtype)
            for positives, margin in self._positives(roles):
                pair = (output.embeddings, positives)
                anchor, positive = reversed(pair) if self.config.method == "tla_sa" else pair
                hinge = triplet_hinge(anchor, positive, roles.negatives, margin) * valid
                triplet, active = triplet + hinge, active + (hinge > 0)
                norm = norm + norm_penalty((anchor, positive, roles.negatives), loss.norm_form) * valid
        # The authors' code multiplies lambda_1 into the norm term as well; the paper does not.
        norm_weight = loss.norm_weight * (loss.triplet_weight if loss.norm_form == "mean_squares" else 1.0)
        share = 1 - loss.view_weight
        total = share * label_term + loss.triplet_weight * triplet + norm_weight * norm + share * pairing
        extra = [weight * term(output, roles.clean or output, labels) for term, weight in self._extra.values()]
        total = sum(extra, total)
        with torch.no_grad():
            correct = output.logits.argmax(1) == (labels if labels.ndim == 1 else labels.argmax(1))
            columns = (total, label_term, triplet, norm, pairing, correct, active, 1 - valid, *extra, none + 1)
            totals = torch.stack([column.double().sum() for column in columns])
        return self._weight(batch) * total.sum(), totals

    def _weight(self, batch: StepBatch) -> float:
        # DDP averages gradients over workers, whose shards may differ by one image: weighting each image by
        # world_size / global size makes that average the mean over the global batch (or, for `sum`, its sum).
        return self.context.world_size / (batch.global_size if self.config.loss.reduction == "mean" else 1)

    def _positives(self, roles: Roles) -> Iterator[tuple[Tensor, float]]:
        loss = self.config.loss
        if self.config.mining.positives != "same_class" and roles.clean is not None:
            yield roles.clean.embeddings, loss.margin * loss.own_margin_scale
        if roles.same_class is not None:
            yield roles.same_class, loss.margin

    def _label_term(self, output: ModelOutput, clean: ModelOutput | None, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The term on labels, and the terms that pair clean with adversarial images, (N,) each."""
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
