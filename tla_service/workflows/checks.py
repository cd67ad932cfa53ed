"""What is checked before a run claims workers."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from tla_service.config import RunConfig
from tla_service.config.fields import attack_trouble
from tla_service.data import Dataset, load_dataset
from tla_service.models import build_model
from tla_service.models.classifier import seen_by_triplets
from tla_service.registry.loading import load_model
from tla_service.registry.packaging import check_packaging
from tla_service.runtime import WorkerContext
from tla_service.tracking.connection import sqlite_path, tracking_uri
from tla_service.training.precheck import (
    check_room,
    check_weights,
    checkpoint_bytes,
    kept_need,
    split_and_check,
)
from tla_service.training.reporting import KEPT


@dataclass(frozen=True)
class Facts:
    """What the checks before a run found out.

    Attributes:
        dataset: The data.
        weights: State dict to start from, or None.
        checkpoint_bytes: Size of a checkpoint, estimated.
        described: Data set facts for the tracking server.
    """

    dataset: Dataset
    weights: Mapping[str, Tensor] | None
    checkpoint_bytes: int
    described: dict[str, str] = field(default_factory=dict)


def check_before_start(config: RunConfig) -> Facts:
    """Load what the run starts from, and check that its parts fit, before any worker is claimed.

    Raises:
        UserError: Data, model or initial weights are missing, or do not fit together.
    """
    trouble = config.tracking.trouble() or attack_trouble("evaluation.test", config.evaluation.test)
    if trouble is not None:
        raise trouble
    dataset = load_dataset(config.data)
    check_split(config, dataset, config.scaling.num_workers if isinstance(config.scaling.num_workers, int) else 1)
    network = build_model(config.model.name, len(dataset.class_names), dataset.image_shape, config.model.normalization)
    seen_by_triplets(network, config.loss.triplet_layer)
    check_packaging(config, dataset.class_names, len(dataset.test), network.embedding_size)
    weights = None
    if config.model.weights is not None:
        uri = tracking_uri(config.tracking)
        weights = load_model(config.model.weights, tracking=uri).state_dict()
        check_weights(config, network, weights)
    described = {
        "data_fingerprint": dataset.fingerprint,
        "classes": str(len(dataset.class_names)),
        "training_images": str(len(dataset.train)),
        "test_images": str(len(dataset.test)),
    }
    return Facts(dataset, weights, checkpoint_bytes(config, network), described)


def check_disks(config: RunConfig, output: Path, folder: str, checkpoint: int, runs: int = 1) -> None:
    """Room for checkpoints, in the storage and where MLflow's artifacts go, as far as they are local.

    Args:
        config: The run.
        output: Its output folder.
        folder: Where its checkpoints are kept, in the storage.
        checkpoint: Size of one, in bytes.
        runs: How many runs keep theirs there.

    Raises:
        UnavailableError: A disk has not enough.
    """
    needs = {"output": (output, checkpoint), "TMPDIR": (Path(tempfile.gettempdir()), checkpoint)}
    if "://" not in folder:
        needs["scaling.storage"] = kept_need(Path(folder).expanduser(), checkpoint, runs * KEPT)
    database = sqlite_path(tracking_uri(config.tracking))
    if database is not None:
        needs["tracking.uri"] = (database.parent, checkpoint)
    check_room(needs)


def check_split(config: RunConfig, dataset: Dataset, num_workers: int) -> None:
    """Pool and batch against the training split: what one worker cannot have, more of them cannot have either."""
    split_and_check(config, dataset, WorkerContext(world_size=num_workers))
