"""A run: epochs of steps, validation, checkpoints, and one evaluation on the test set at the end."""

import time
from collections.abc import Mapping
from operator import itemgetter
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn

from tla_service.config import RunConfig
from tla_service.data import StepBatch, load_dataset
from tla_service.models import Architecture, ImageClassifier
from tla_service.runtime import (
    WorkerContext,
    average_buffers,
    failing_together,
    gather_objects,
    keep_freed_memory,
    mixed_seed,
)
from tla_service.training.adversary import layout_of
from tla_service.training.average import WeightAverage
from tla_service.training.checkpoint import (
    TrainingState,
    check_alike,
    cpu_weights,
    data_facts,
    load_checkpoint,
    restore,
    save_checkpoint,
)
from tla_service.training.meter import COLLAPSED, ROBUST, Meter, Phases, collapses, has_collapsed
from tla_service.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from tla_service.training.output import FitResult
from tla_service.training.precheck import split_and_check
from tla_service.training.pretrained import set_train_mode
from tla_service.training.rejector import fit_rejector
from tla_service.training.reporting import Reporter
from tla_service.training.step import TrainingStep
from tla_service.training.validation import ImageSet, Validator, taken

_CLEAN = "validation/clean_accuracy"


class Run:
    """One worker's part of a run, in a plain process, under torchrun or Ray Train: only the reporter differs."""

    def __init__(
        self,
        config: RunConfig,
        context: WorkerContext,
        reporter: Reporter,
        code: bytes | None = None,
        validator: Validator | None = None,  # on every worker of a run that trains on during validation
    ) -> None:
        self._given, self.context, self.reporter, self._validator = config, context, reporter, validator
        self.config = config = config.on_device(has_gpu=context.device.type == "cuda")
        self.phases, self._saved_at = Phases(config, context), time.monotonic()
        if config.speed.keep_freed_memory and context.device.type == "cpu":
            keep_freed_memory()
        with self.phases("data"), failing_together(context):
            config.check_device(has_gpu=context.device.type == "cuda")
            self.architecture = Architecture.of(config.model, code)
            self.dataset = load_dataset(config.data)
            parts = split_and_check(config, self.dataset, context, self.architecture)
            self.train_rows, self.validation, self.batches, self._extra_facts = parts
            self._validation_set = ImageSet.validation(config, self.validation, self.architecture.code)
            self._data_facts = data_facts(self.dataset, self._extra_facts, self.architecture)
        self.total_steps = config.training.epochs * self.batches.steps_per_epoch
        if config.training.max_steps is not None:
            self.total_steps = min(self.total_steps, config.training.max_steps)

    def build(self) -> ImageClassifier:
        """The network with random weights, on the CPU."""
        return self.architecture.build(len(self.dataset.class_names), self.dataset.image_shape)

    def start(self, initial_weights: Mapping[str, Tensor] | None) -> None:
        """Build network, optimizer and step; load the newest intact checkpoint, or else the initial weights, if any.

        Everything that can refuse a run has been checked when this returns, and rank 0 has reported `start`.
        """
        config, context = self.config, self.context
        with self.phases("build"), failing_together(context):
            torch.manual_seed(mixed_seed(config.seed, 0))
            network = self.build()
            if initial_weights:  # without a new head, of which every worker has drawn the same
                network.load_state_dict({**network.state_dict(), **initial_weights})
            network = network.to(context.device, memory_format=layout_of(config))  # type: ignore[call-overload]
            average = None
            if config.training.ema_decay is not None:
                average = WeightAverage(network, config.training.ema_decay)
            self.state = TrainingState(network, build_optimizer(network, config), average)
        with self.phases("build"):
            check_alike(self._data_facts, config, context)
            resumed_from = restore(
                self.reporter.stored,
                lambda folder: load_checkpoint(folder, self.state, config, self._data_facts, context),
                context,
                lambda message: self._tell(event="damaged_checkpoint", message=message),
            )
            with failing_together(context):
                self.step = TrainingStep(network, config, context, self.architecture.code)
                for name, value in self.state.own_statistics.items():
                    self.state.statistics[name].copy_(value)
            self.step.adversary.prepare(*((size, *self.dataset.image_shape) for size in self.batches.sizes))
        if has_collapsed(self.state.history):
            self._after_collapse()
        self._submit()  # what was not known when the checkpoint was written
        if network.found:
            self._tell(event="network", message=f"embedding: {network.found}")
        workers = f"{context.world_size} worker{'s' if context.world_size != 1 else ''}"
        sizes = self.state.workers
        if not sizes or sizes[-1][1] != context.world_size:
            workers += f" (before: {sizes[-1][1]})" if sizes else ""
            sizes.append([self.state.step, context.world_size])
        speed = {"channels_last": config.training.channels_last, "cuda_graphs": self.step.adversary.uses_graphs}
        workers += "".join(f", {name}" for name, is_on in speed.items() if is_on)
        self._tell(
            event="start",
            workers=context.world_size,
            sizes=sizes,
            epochs=-(-self.total_steps // self.batches.steps_per_epoch),
            speed=speed | {"compile": config.speed.compile, "precision": config.training.precision},
            resumed=bool(resumed_from),
            resumed_from=resumed_from,
            # A driver that was killed may have missed epochs that its workers still did.
            history=self.state.history,
            message=f"resuming from {resumed_from} on {workers}" if resumed_from else f"training on {workers}",
        )

    def train(self, *, measure_test: bool = True, with_rejector: bool = False) -> FitResult:
        """Train to the end, or until a stop is requested, and then measure the best weights on the test set, if asked.

        Runs that are compared for selection must not ask. Only rank 0 fits the detector; all else is the same on
        all ranks, which raise NonFiniteLossError together.
        """
        interrupted = False
        while self.state.step < self.total_steps and not interrupted:
            interrupted = not (self.train_epoch() and self.finish_epoch())
        state, config, dataset, context = self.state, self.config, self.dataset, self.context
        test: dict[str, float] = {}
        rejector: dict[str, npt.NDArray[Any]] = {}
        if not interrupted:
            state.network.load_state_dict(state.best_weights)
            if measure_test:
                with self.phases("test"):
                    test = ImageSet.test(config, dataset, self.architecture.code).measure(state.network, context)
            if with_rejector and context.is_main:
                with self.phases("detector"):
                    train = dataset.train, self.train_rows
                    rejector = fit_rejector(state.network, train, self.validation, config, context.device)
        facts = {
            "data_fingerprint": dataset.fingerprint,
            "training_images": str(len(self.train_rows)),
            "validation_images": str(len(self.validation[1])),
            "test_images": str(len(dataset.test)),
            **self._extra_facts,
            "workers": ", then ".join(str(workers) for _, workers in self.state.workers),
            "device": torch.cuda.get_device_name() if context.device.type == "cuda" else "cpu",
        }
        return FitResult(interrupted, test, state.best, state.history, self.phases.seconds, facts, rejector)

    def train_epoch(self) -> bool:
        """Train to the end of the epoch; False, with a checkpoint saved, if a stop was requested before."""
        state, schedule = self.state, self.config.schedule
        epoch, offset = divmod(state.step, self.batches.steps_per_epoch)
        self.meter = Meter(self.context, state.partial_totals, tuple(self.config.loss.extra))
        set_train_mode(state.network, self.config)
        with self.phases("train"):
            for batch in self.batches.epoch(epoch, offset):
                factor = learning_rate_factor(schedule, state.step, self.batches.steps_per_epoch, self.total_steps)
                set_learning_rate(state.optimizer, self.config.optimizer.learning_rate * factor)
                self.meter.add(self._update(batch))
                state.step += 1
                if state.step == self.total_steps or state.step % self.batches.steps_per_epoch == 0:
                    break
                if state.step % self.config.training.log_every_steps == 0:
                    self._log(epoch)
                    if self.meter.save_requested or self.meter.stop_requested:
                        state.partial_totals = self.meter.epoch_totals
                        self._save(None)  # means over part of an epoch are not its metrics
                    if self.meter.stop_requested:
                        return False
        return True

    def finish_epoch(self) -> bool:
        """Average BatchNorm statistics, validate, keep the best weights, save and report; False to stop early."""
        state, meter = self.state, self.meter
        epoch = (state.step - 1) // self.batches.steps_per_epoch
        self._reduce()
        average_buffers(state.network, self.context)
        if state.average is not None:
            average_buffers(state.average.module, self.context)
        metrics = {
            "epoch": float(epoch),
            "step": float(state.step),
            "learning_rate": float(state.optimizer.param_groups[0]["lr"]),
            "images_per_second": meter.images_per_second,
            **meter.means,
        }
        due = state.step == self.total_steps or (epoch + 1) % self.config.evaluation.every_epochs == 0
        state.history.append(metrics)
        self._take_validated(wait=due)  # of an earlier epoch
        if due and self._validator is not None:
            state.validating, state.validating_weights = epoch, cpu_weights(state.evaluated)
            self._submit()
            if state.step == self.total_steps:
                self._take_validated(wait=True)
        elif due:
            with self.phases("validation"):
                measured = self._validation_set.measure(state.evaluated, self.context)
            if self._add_validated(metrics, measured):
                # Every rank keeps them: any rank may become rank 0 after a restart, and all need them for the test.
                state.best_weights = cpu_weights(state.evaluated)
            if not has_collapsed(state.history) and collapses(metrics, state.best, self.config):
                metrics[COLLAPSED] = 1.0
                self._answer_collapse(metrics)
        state.partial_totals = []
        stopping = meter.stop_requested and state.step != self.total_steps
        if due or stopping or meter.save_requested:
            self._save(metrics)
        else:
            self.reporter.report(metrics, None, "")
        return not stopping

    def _add_validated(self, metrics: dict[str, float], measured: Mapping[str, float]) -> bool:
        """Add its validation to an epoch's metrics; whether it is the best so far, whose weights are to be kept."""
        metrics |= {f"validation/{name}": value for name, value in measured.items()}
        score = itemgetter(f"validation/{self.config.selected_by}", ROBUST, _CLEAN)
        is_best = not self.state.best or score(metrics) > score(self.state.best)
        if is_best:
            self.state.best = metrics
        return is_best

    def _submit(self) -> None:
        if self._validator is not None and self.context.is_main and self.state.validating_weights:
            self._validator.submit(self.state.validating_weights)

    def _take_validated(self, *, wait: bool) -> None:
        """Take what is measured beside training, if there is anything: once it is known, or `wait` for it."""
        state, context, weights = self.state, self.context, self.state.validating_weights
        if not weights:
            return
        with self.phases("validation"):
            if self._validator is None:  # the run resumed without
                network = self.build()
                network.load_state_dict(weights)
                measured: dict[str, float] | None = self._validation_set.measure(network.to(context.device), context)
            else:
                warn = f"training waits for the validation of epoch {state.validating}"
                measured = taken(self._validator, context, self._tell, warn, wait=wait)
        if measured is None:
            return
        metrics = state.history[state.validating]
        if self._add_validated(metrics, measured):
            state.best_weights = weights
        if metrics is not state.history[-1]:  # else it is about to be reported
            named = {name: value for name, value in metrics.items() if name.startswith("validation/")}
            self._tell(event="validation", metrics={"epoch": metrics["epoch"], **named})
        state.validating, state.validating_weights = -1, {}

    def _update(self, batch: StepBatch) -> Tensor:
        """Update the weights on a batch: once, or once per replay of free training. Returns the last sums."""
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
        config, state = self.config, self.state
        act = "continuing from the best weights with PGD"
        if config.attack.on_collapse == "stop":
            act = "the run ends with the best weights"
        fell = f"robust accuracy on validation {metrics[ROBUST]:.1%}, before {state.best[ROBUST]:.1%}"
        message = f"single-step training collapsed in epoch {metrics['epoch']:.0f}: {fell}; {act}"
        self._tell(event="collapse", message=message)
        if config.attack.on_collapse == "pgd":
            state.network.load_state_dict(state.best_weights)
            state.optimizer = build_optimizer(self.step.network, config)
            if state.average is not None:
                state.average.module.load_state_dict(state.best_weights)
        self._after_collapse()

    def _after_collapse(self) -> None:
        if self.config.attack.on_collapse == "pgd":
            self.step.adversary.kind = "pgd"
        else:
            self.total_steps = self.state.step

    def _reduce(self) -> None:
        late = time.monotonic() - self._saved_at >= 60 * self.config.training.checkpoint_minutes
        save = self.reporter.save_requested() or (late and self.context.is_main)
        stop = self.reporter.stop_requested()
        self.meter.reduce(self.state.step, save_requested=save, stop_requested=stop)

    def _log(self, epoch: int) -> None:
        meter, step = self.meter, self.state.step
        self._reduce()
        images_per_step = len(self.train_rows) / self.batches.steps_per_epoch + self.config.extra_per_step
        self._tell(
            event="step",
            epoch=epoch,
            step=step,
            total_steps=self.total_steps,
            loss=meter.means["train/loss"],
            images_per_second=meter.images_per_second,
            seconds_left=(self.total_steps - step) * images_per_step / max(meter.images_per_second, 1e-9),
        )

    def _tell(self, **record: Any) -> None:
        if self.context.is_main:
            self.reporter.progress(record)

    def _save(self, metrics: dict[str, float] | None) -> None:
        name = f"step-{self.state.step:09d}"
        with self.phases("checkpoint"):
            target = self.reporter.destination(name) if self.context.is_main else None
            # Within an epoch each of several workers has its own; at its end they have been averaged.
            differ = metrics is None and self.context.world_size > 1
            own = {name: value.cpu() for name, value in self.state.statistics.items()} if differ else {}
            every = gather_objects(own, self.context)
            code = self.architecture.code
            with failing_together(self.context):
                if target is not None:
                    save_checkpoint(target, self.state, self._given, self._data_facts, code, every)
                self.reporter.report(metrics, target, name)
        self._saved_at = time.monotonic()
