"""A run: epochs of steps, validation, checkpoints, and one look at the test set at the end.

The same call serves a plain process, torchrun and a Ray Train worker; what differs is the Reporter.
"""

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tla_service.attacks import Attack
from tla_service.config import RunConfig
from tla_service.config.adversary import EvaluationAttack
from tla_service.data import (
    Dataset,
    EvaluationBatches,
    ImageSource,
    StepBatch,
    TrainingBatches,
    load_dataset,
    split_validation,
)
from tla_service.evaluation.robustness import evaluation_attack, measure_accuracy
from tla_service.models import build_model
from tla_service.runtime import WorkerContext, failing_together, keep_freed_memory, mixed_seed
from tla_service.training.checkpoint import TrainingState, cpu_weights, load_checkpoint, save_checkpoint
from tla_service.training.guard import COLLAPSED, collapses, has_collapsed, message
from tla_service.training.meter import Meter
from tla_service.training.optimizer import build_optimizer
from tla_service.training.precheck import check_start, check_weights
from tla_service.training.rejector import fit_rejector
from tla_service.training.reporting import Reporter
from tla_service.training.result import FitResult, Phases
from tla_service.training.resume import restore
from tla_service.training.schedule import learning_rate_factor
from tla_service.training.step import TrainingStep


def fit(
    config: RunConfig,
    context: WorkerContext,
    reporter: Reporter,
    *,
    initial_weights: Mapping[str, Tensor] | None = None,
    measure_test: bool = True,
    with_rejector: bool = False,
) -> FitResult:
    """Train, choose the best weights on the validation split, and measure them once on the test set.

    Args:
        config: The run.
        context: This worker; its process group is already up.
        reporter: Where progress, metrics and checkpoints go, and checkpoints to resume from are found.
        initial_weights: State dict to start from (fine-tuning); ignored by a run that resumes.
        measure_test: Leave the test set alone if False: runs that are compared to choose among them must not see it.
        with_rejector: Fit the detector that is packaged with the best weights as well.

    Returns:
        Metrics, the same on every rank; the detector on rank 0 only.

    Raises:
        NonFiniteLossError: The loss became NaN or infinite; all ranks stop together.
        UserError: The data or the checkpoint cannot be used.
    """
    run = Run(config, context, reporter)
    run.start(initial_weights)
    return run.train(measure_test=measure_test, with_rejector=with_rejector)


class Run:
    """One worker's part of a run.

    Args:
        config: The run.
        context: This worker.
        reporter: Where progress, metrics and checkpoints go, and checkpoints to resume from are found.
    """

    def __init__(self, config: RunConfig, context: WorkerContext, reporter: Reporter) -> None:
        self.config, self.context, self.reporter = config, context, reporter
        self.phases = Phases()
        if config.speed.keep_freed_memory and context.device.type == "cpu":
            keep_freed_memory()
        with self.phases("data"), failing_together(context):
            self.dataset = load_dataset(config.data)
            self.train_rows, self.validation_rows = split_validation(
                self.dataset.train.labels, config.data.validation_fraction, config.seed, self.dataset.class_names
            )
            self.batches = training_batches(config, self.dataset, self.train_rows, context)
            self._data_facts = {
                "class_names": list(self.dataset.class_names),
                "image_shape": list(self.dataset.image_shape),
                "fingerprint": self.dataset.fingerprint,
                "training_fingerprint": self.dataset.train.digest(),
            }
            check_start(config, self.dataset, self.train_rows, context.world_size)
        self.total_steps = config.training.epochs * self.batches.steps_per_epoch
        if config.training.max_steps is not None:
            self.total_steps = min(self.total_steps, config.training.max_steps)

    def start(self, initial_weights: Mapping[str, Tensor] | None) -> None:
        """Build network, optimiser and step; load the newest checkpoint that is whole, if there is any.

        Everything that can refuse a run has been checked when this returns; rank 0 has then reported `start`.
        """
        config, context = self.config, self.context
        with self.phases("build"), failing_together(context):
            torch.manual_seed(mixed_seed(config.seed, 0))
            network = build_model(
                config.model.name, len(self.dataset.class_names), self.dataset.image_shape, config.model.normalization
            )
            if initial_weights is not None:
                check_weights(config, network, initial_weights)
                network.load_state_dict(dict(initial_weights))
            layout = torch.channels_last if config.training.channels_last else torch.contiguous_format
            network = network.to(context.device, memory_format=layout)  # type: ignore[call-overload]
            average = None
            if config.training.ema_decay is not None:
                update = get_ema_multi_avg_fn(config.training.ema_decay)
                average = AveragedModel(network, multi_avg_fn=update, use_buffers=True)
            self.state = TrainingState(network, build_optimizer(network, config), average)
        with self.phases("build"):
            resumed_from = restore(
                self.reporter.stored,
                lambda folder: load_checkpoint(folder, self.state, config, self._data_facts),
                context,
                lambda message: self.reporter.progress({"event": "damaged_checkpoint", "message": message}),
            )
            with failing_together(context):
                self.step = TrainingStep(network, config, context)
        if has_collapsed(self.state.history):
            self._after_collapse()
        if context.is_main:
            workers = f"{context.world_size} worker{'s' if context.world_size != 1 else ''}"
            resumes = f"resuming from {resumed_from} on {workers}"
            self.reporter.progress(
                {
                    "event": "start",
                    "workers": context.world_size,
                    "resumed": bool(resumed_from),
                    "resumed_from": resumed_from,
                    # A driver that was killed may have missed epochs that its workers still did.
                    "history": self.state.history,
                    "message": resumes if resumed_from else f"training on {workers}",
                }
            )

    def train(self, *, measure_test: bool = True, with_rejector: bool = False) -> FitResult:
        """Train to the end, or until a stop is asked for; arguments and result as for `fit`."""
        while self.state.step < self.total_steps:
            if not (self.train_epoch() and self.finish_epoch()):
                return self.result(interrupted=True)
        return self.result(interrupted=False, measure_test=measure_test, with_rejector=with_rejector)

    def train_epoch(self) -> bool:
        """Train to the end of the epoch; False if a stop was asked for on the way: the checkpoint is saved then."""
        state, training = self.state, self.config.training
        epoch, offset = divmod(state.step, self.batches.steps_per_epoch)
        self.meter = Meter(self.context, state.partial_totals)
        state.network.train()
        with self.phases("train"):
            for batch in self.batches.epoch(epoch, offset):
                self._set_learning_rate()
                self.meter.add(self._update(batch))
                state.step += 1
                if state.step == self.total_steps or state.step % self.batches.steps_per_epoch == 0:
                    break
                if state.step % training.log_every_steps == 0 and self._log(epoch):
                    state.partial_totals = self.meter.epoch_totals
                    self._save(None)  # means over a part of an epoch are no epoch's metrics
                    return False
        return True

    def finish_epoch(self) -> bool:
        """Average BatchNorm statistics over workers, validate, keep the best weights, save and report.

        Returns:
            False if the run is to stop here before its end.
        """
        epoch = (self.state.step - 1) // self.batches.steps_per_epoch
        self.meter.reduce(self.reporter.stop_requested())
        self.meter.check_finite(self.state.step)
        average_buffers(self.state.network, self.context)
        if self.state.average is not None:
            average_buffers(self.state.average.module, self.context)
        metrics = self._epoch_metrics(epoch)
        is_last = self.state.step == self.total_steps
        due = is_last or (epoch + 1) % self.config.evaluation.every_epochs == 0
        if due:
            with self.phases("validation"):
                measured = self._validate()
            metrics |= {f"validation/{name}": value for name, value in measured.items()}
            self._keep_best(metrics)
            if not has_collapsed(self.state.history) and collapses(metrics, self.state.best, self.config):
                metrics[COLLAPSED] = 1.0
        self.state.history.append(metrics)
        if COLLAPSED in metrics:
            self._answer_collapse(metrics)
            is_last = self.state.step == self.total_steps
        self.state.partial_totals = []
        stopping = self.meter.stop_requested and not is_last
        if due or stopping:
            self._save(metrics)
        else:
            self.reporter.report(metrics, None, "")
        return not stopping

    def result(self, *, interrupted: bool, measure_test: bool = True, with_rejector: bool = False) -> FitResult:
        """Load the best weights into the network, measure them on the test set if wanted, and sum the run up."""
        test: dict[str, float] = {}
        rejector: dict[str, npt.NDArray[Any]] = {}
        if not interrupted:
            self._load_best()
        if measure_test and not interrupted:
            with self.phases("test"):
                attacks = {
                    name: self._attack(attack, f"evaluation.test.{name}")
                    for name, attack in self.config.evaluation.test.items()
                }
                rows = torch.arange(len(self.dataset.test))
                test = self._measure(self.dataset.test, rows, attacks, self.state.network)
        if with_rejector and not interrupted and self.context.is_main:
            with self.phases("detector"):
                rejector = fit_rejector(
                    self.state.network,
                    self.dataset.train,
                    self.train_rows,
                    self.validation_rows,
                    self.config,
                    self.context.device,
                )
        facts = {
            "data_fingerprint": self.dataset.fingerprint,
            "training_images": str(len(self.train_rows)),
            "validation_images": str(len(self.validation_rows)),
            "test_images": str(len(self.dataset.test)),
            "workers": str(self.context.world_size),
            "device": torch.cuda.get_device_name() if self.context.device.type == "cuda" else "cpu",
        }
        return FitResult(interrupted, test, self.state.best, self.state.history, self.phases.seconds, facts, rejector)

    # ------------------------------------------------------------------------------------------------ the parts

    def _update(self, batch: StepBatch) -> Tensor:
        """Move the weights by a batch: once, or as often as free training replays it. Returns the last sums."""
        state, position = self.state, (self.state.step, self.context.rank)
        self.step.adversary.grow((state.step + 1) / self.total_steps)
        # Dropout draws from the global generator; this ties its draws to the position too.
        torch.manual_seed(mixed_seed(self.config.seed, 1, *position))
        totals = torch.empty(0)
        state.optimizer.zero_grad(set_to_none=True)
        for sums in self.step.updates(batch, self.config.seed, 2, *position):
            totals = sums
            if self.config.optimizer.grad_clip is not None:
                nn.utils.clip_grad_norm_(state.network.parameters(), self.config.optimizer.grad_clip)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            if state.average is not None:
                state.average.update_parameters(state.network)
        return totals

    def _answer_collapse(self, metrics: Mapping[str, float]) -> None:
        """Say what happened, and put the best weights back where training goes on from them."""
        config, state = self.config, self.state
        if self.context.is_main:
            self.reporter.progress({"event": "collapse", "message": message(metrics, state.best, config)})
        if config.attack.on_collapse == "pgd":
            self._load_best()
            state.optimizer = build_optimizer(state.network, config)
            if state.average is not None:
                state.average.module.load_state_dict(state.best_weights)
        self._after_collapse()

    def _after_collapse(self) -> None:
        if self.config.attack.on_collapse == "pgd":
            self.step.adversary.kind = "pgd"
        else:
            self.total_steps = self.state.step

    def _set_learning_rate(self) -> None:
        factor = learning_rate_factor(
            self.config.schedule, self.state.step, self.batches.steps_per_epoch, self.total_steps
        )
        for group in self.state.optimizer.param_groups:
            group["lr"] = self.config.optimizer.learning_rate * factor

    def _log(self, epoch: int) -> bool:
        """Sum the last steps over the workers and tell rank 0's reporter; True if the run is to stop."""
        self.meter.reduce(self.reporter.stop_requested())
        self.meter.check_finite(self.state.step)
        if self.context.is_main:
            rate = self.meter.images_per_second
            left = self.total_steps - self.state.step
            images_a_step = len(self.train_rows) / self.batches.steps_per_epoch
            record = {
                "event": "step",
                "epoch": epoch,
                "step": self.state.step,
                "total_steps": self.total_steps,
                "loss": self.meter.means["train/loss"],
                "images_per_second": rate,
                "seconds_left": left * images_a_step / max(rate, 1e-9),
            }
            self.reporter.progress(record)
        return self.meter.stop_requested

    def _epoch_metrics(self, epoch: int) -> dict[str, float]:
        return {
            "epoch": float(epoch),
            "step": float(self.state.step),
            "learning_rate": float(self.state.optimizer.param_groups[0]["lr"]),
            "images_per_second": self.meter.images_per_second,
            **self.meter.means,
        }

    def _validate(self) -> dict[str, float]:
        attack = self._attack(self.config.evaluation.validation, "evaluation.validation")
        rows = self.validation_rows
        limit = self.config.evaluation.validation_limit
        if limit is not None and limit < len(rows):
            rows = rows[torch.linspace(0, len(rows) - 1, limit).long()]
        return self._measure(self.dataset.train, rows, {"validation": attack}, self.state.evaluated)

    def _attack(self, attack: EvaluationAttack, field: str) -> Attack:
        return evaluation_attack(attack, self.config.attack, self.config.data.name, field)

    def _measure(self, source: Any, rows: Tensor, attacks: Mapping[str, Any], network: nn.Module) -> dict[str, float]:
        batches = EvaluationBatches(source, rows, self.context, batch_size=self.config.evaluation.batch_size)
        return measure_accuracy(network, batches, attacks, self.context, mixed_seed(self.config.seed, 3))

    def _keep_best(self, metrics: dict[str, float]) -> None:
        def rank(of: Mapping[str, float]) -> tuple[float, float]:
            return of["validation/robust_accuracy"], of["validation/clean_accuracy"]

        if not self.state.best or rank(metrics) > rank(self.state.best):
            self.state.best = metrics
            # Every rank keeps them: any rank may become rank 0 after a restart, and all need them for the test.
            self.state.best_weights = cpu_weights(self.state.evaluated)

    def _load_best(self) -> None:
        self.state.network.load_state_dict(self.state.best_weights)

    def _save(self, metrics: dict[str, float] | None) -> None:
        name = f"step-{self.state.step:09d}"
        with self.phases("checkpoint"):
            target = self.reporter.destination(name) if self.context.is_main else None
            with failing_together(self.context):
                if target is not None:
                    save_checkpoint(target, self.state, self.config, self._data_facts)
                self.reporter.report(metrics, target, name)


def training_batches(config: RunConfig, dataset: Dataset, rows: Tensor, context: WorkerContext) -> TrainingBatches:
    """The training split as batches with what the method's mining needs."""
    return training_batches_of(config, dataset.train, rows, context)


def training_batches_of(
    config: RunConfig, source: ImageSource, rows: Tensor, context: WorkerContext
) -> TrainingBatches:
    """Some of a source's images as batches with what the method's mining needs."""
    config.check_workers(context.world_size)
    mining = config.mining
    separate = config.mines_triplets and mining.pool == "separate"
    pool_size = mining.pool_size if separate else 0
    if mining.scope == "global":
        pool_size //= context.world_size
    return TrainingBatches(
        source,
        rows,
        config.data,
        context,
        global_batch_size=config.training.global_batch_size,
        seed=config.seed,
        pool_size_per_worker=pool_size,
        same_class_positives=separate and mining.positives != "own",
        augment_pool=mining.augment_pool,
    )


def average_buffers(network: nn.Module, context: WorkerContext) -> None:
    """Make BatchNorm's running statistics the mean over workers: each has seen only its own shards."""
    if context.world_size == 1:
        return
    for buffer in network.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer.div_(context.world_size)
