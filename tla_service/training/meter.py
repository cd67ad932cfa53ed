"""What a run measures while it trains: sums over an epoch, wall time, and whether single-step training collapsed."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tla_service.config import RunConfig
from tla_service.errors import OutOfMemoryError, one_line
from tla_service.runtime import WorkerContext, all_reduce_sum, hardware
from tla_service.training.step import TOTALS

ROBUST = "validation/robust_accuracy"
COLLAPSED = "collapsed"
# What lack of memory is called by CUDA, and by torch's allocators on CPUs.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite; a retry would end the same."""


class Meter:
    """Adds up `step.TOTALS` over steps and workers, on top of an epoch's sums before a restart.

    `extra` are the paths of the user's own loss terms.
    """

    def __init__(self, context: WorkerContext, partial_totals: Sequence[float] = (), extra: Sequence[str] = ()) -> None:
        self._context, self._names = context, (*TOTALS[:-1], *extra, TOTALS[-1])
        # The last entries transport requests, so that all workers save or stop at the same step.
        self._window = torch.zeros(len(self._names) + 2, dtype=torch.float64, device=context.device)
        self.epoch_totals = list(partial_totals or [0.0] * len(self._names))
        self.save_requested = self.stop_requested = False
        self._begin = time.perf_counter()
        self._images_before = self.epoch_totals[-1]

    def add(self, totals: Tensor) -> None:
        """Add a step's sums (T,); does not wait for the device."""
        self._window[:-2] += totals

    def reduce(self, step: int, *, save_requested: bool, stop_requested: bool) -> None:
        """Sum over all workers what was added since the last call, and read it: the only wait for the device."""
        self._window[-2], self._window[-1] = float(save_requested), float(stop_requested)
        *totals, save, stop = all_reduce_sum(self._window, self._context).tolist()
        self.epoch_totals = [old + new for old, new in zip(self.epoch_totals, totals, strict=True)]
        self.save_requested, self.stop_requested = save > 0, stop > 0
        self._window.zero_()
        if not math.isfinite(self.epoch_totals[0]):
            message = f"the loss is not finite by step {step}; lower optimizer.learning_rate or set optimizer.grad_clip"
            raise NonFiniteLossError(message)

    @property
    def means(self) -> dict[str, float]:
        """Means over the epoch's images so far."""
        sums = dict(zip(self._names, self.epoch_totals, strict=True))
        images = max(1.0, sums["images"])
        return {f"train/{name}": sums[name] / images for name in self._names[:-1]}

    @property
    def images_per_second(self) -> float:
        """Images trained on per second, over all workers, since the epoch began or resumed here."""
        return (self.epoch_totals[-1] - self._images_before) / (time.perf_counter() - self._begin)


def memory_remedy(config: RunConfig, workers: int) -> str:
    """What the memory of each of so many workers was needed for, and what to lower."""
    mining, pool = config.mining, ""
    if config.mines_triplets and mining.pool == "separate":
        pool = f" and a pool of {mining.pool_size // (workers if mining.scope == 'global' else 1)}"
    load = f"{-(-config.training.global_batch_size // workers)} images{pool}, for {config.model.name}"
    lower = "training.global_batch_size, mining.pool_size or evaluation.batch_size, run fewer workers per node or GPU"
    shares = "(scaling.cpus_per_worker, scaling.gpus_per_worker), or set training.precision to bfloat16"
    return f"each worker had {load} in {config.training.precision}: lower {lower} {shares}"


class Phases:
    """Adds up wall time by phase; lack of memory becomes an error that says what to lower."""

    def __init__(self, config: RunConfig, context: WorkerContext) -> None:
        self._config, self._context = config, context
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time of a block towards a phase."""
        begin = time.perf_counter()
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in _OUT_OF_MEMORY):
                raise
            place = f"rank {self._context.rank}, {hardware(self._context.device)}, {name}"
            reason = f"out of memory ({place}: {one_line(error)})"
            remedy = memory_remedy(self._config, self._context.world_size)
            batch = self._config.training.global_batch_size
            raise OutOfMemoryError("training.global_batch_size", batch, reason, remedy) from error
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


def has_collapsed(history: Sequence[Mapping[str, float]]) -> bool:
    """Whether an epoch was marked; a resumed run knows from it, too."""
    return any(COLLAPSED in epoch for epoch in history)


def collapses(metrics: Mapping[str, float], best: Mapping[str, float], config: RunConfig) -> bool:
    """Whether single-step training suddenly resists only its own attack: catastrophic overfitting.

    Wong et al. 2020 found it in FGSM training and detect it with PGD; de Jorge et al. 2022 delay it with noise.
    """
    return config.watches_collapse and metrics[ROBUST] < (1 - config.attack.collapse_drop) * best[ROBUST]
