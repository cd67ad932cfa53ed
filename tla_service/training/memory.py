"""Running out of memory: what to lower, with the numbers of the run."""

from tla_service.config import RunConfig
from tla_service.errors import OutOfMemoryError, one_line
from tla_service.runtime import WorkerContext, hardware

_WORDS = ("out of memory", "can't allocate memory", "not enough memory")  # of CUDA, and of torch's allocators on CPUs


def out_of_memory(error: Exception, config: RunConfig, context: WorkerContext, phase: str) -> OutOfMemoryError | None:
    """Say what to lower if an error in a phase of the run is lack of memory; None for other errors."""
    if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in _WORDS):
        return None
    reason = f"out of memory (rank {context.rank}, {hardware(context.device)}, {phase}: {one_line(error)})"
    remedy = memory_remedy(config, context.world_size)
    return OutOfMemoryError("training.global_batch_size", config.training.global_batch_size, reason, remedy)


def memory_remedy(config: RunConfig, workers: int) -> str:
    """What the memory of each of so many workers was needed for, and what to lower."""
    mining, pool = config.mining, ""
    if config.mines_triplets and mining.pool == "separate":
        pool = f" and a pool of {mining.pool_size // (workers if mining.scope == 'global' else 1)}"
    load = f"{-(-config.training.global_batch_size // workers)} images{pool}, for {config.model.name}"
    lower = "training.global_batch_size, mining.pool_size or evaluation.batch_size, run fewer workers per node or GPU"
    shares = "(scaling.cpus_per_worker, scaling.gpus_per_worker), or set training.precision to bfloat16"
    return f"each worker had {load} in {config.training.precision}: lower {lower} {shares}"
