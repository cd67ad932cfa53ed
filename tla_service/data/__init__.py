"""Where images come from: data sets by name, splits, batches."""

from tla_service.data.batches import Batch, EvaluationBatches, StepBatch, TrainingBatches
from tla_service.data.catalog import load_dataset
from tla_service.data.roots import check_root
from tla_service.data.sources import ArraySource, Dataset, ImageSource
from tla_service.data.splits import split_training, split_validation

__all__ = [
    "ArraySource",
    "Batch",
    "Dataset",
    "EvaluationBatches",
    "ImageSource",
    "StepBatch",
    "TrainingBatches",
    "check_root",
    "load_dataset",
    "split_training",
    "split_validation",
]
