"""Running out of memory: what to lower, with the numbers of the run."""

from tla_service.config import RunConfig


def memory_remedy(config: RunConfig, workers: int) -> str:
    """What the memory of each of so many workers was needed for, and what to lower."""
    mining, pool = config.mining, ""
    if config.mines_triplets and mining.pool == "separate":
        pool = f" and a pool of {mining.pool_size // (workers if mining.scope == 'global' else 1)}"
    load = f"{-(-config.training.global_batch_size // workers)} images{pool}, for {config.model.name}"
    lower = "training.global_batch_size, mining.pool_size or evaluation.batch_size, run fewer workers per node or GPU"
    shares = "(scaling.cpus_per_worker, scaling.gpus_per_worker), or set training.precision to bfloat16"
    return f"each worker had {load} in {config.training.precision}: lower {lower} {shares}"
