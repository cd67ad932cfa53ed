"""Running out of memory: what to lower, with the numbers of the run."""

import torch

from tla_service.config import RunConfig
from tla_service.errors import OutOfMemoryError, one_line
from tla_service.runtime import WorkerContext, hardware

_WORDS = ("out of memory", "can't allocate memory", "not enough memory")  # of CUDA, and of torch's allocators on CPUs


def out_of_memory(error: Exception, config: RunConfig, context: WorkerContext, phase: str) -> OutOfMemoryError | None:
    """Say what to lower if an error of a phase of the run is lack of memory; None for other errors."""
    text = str(error).lower()
    if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not any(words in text for words in _WORDS):
        return None
    where = f"rank {context.rank}, {hardware(context.device)}"
    reason = f"out of memory ({where}, {phase}: {one_line(error)})"
    if phase == "data":
        return OutOfMemoryError(
            "data.residency", config.data.residency, reason, "use stream, or fewer workers per node"
        )
    if phase in ("validation", "test", "detector"):
        return OutOfMemoryError("evaluation.batch_size", config.evaluation.batch_size, reason, "lower it")
    remedy = memory_remedy(config, context.world_size, has_gpu=context.device.type == "cuda")
    return OutOfMemoryError("training.global_batch_size", config.training.global_batch_size, reason, remedy)


def memory_remedy(config: RunConfig, workers: int, *, has_gpu: bool) -> str:
    """What lowers a training worker's memory, with the numbers of this run."""
    mining, numbers = config.mining, [f"{-(-config.training.global_batch_size // workers)} images per worker"]
    lower = ["training.global_batch_size"]
    if config.mines_triplets and mining.pool == "separate":
        pool = mining.pool_size // (workers if mining.scope == "global" else 1)
        numbers.append(f"a pool of {pool}")
        lower.append("mining.pool_size")
    numbers.append(f"{config.model.name} in {config.training.precision}")
    others = ["use more workers" if has_gpu else "run fewer workers per node (scaling.cpus_per_worker)"]
    if has_gpu and config.training.precision == "float32":
        others.append("set training.precision to bfloat16")
    if has_gpu and config.scaling.gpus_per_worker < 1:
        others.append("raise scaling.gpus_per_worker")
    return f"lower {' or '.join(lower)} ({', '.join(numbers)}), or {', or '.join(others)}"
