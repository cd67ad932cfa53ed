"""Networks: images in [0, 1] go in, logits and penultimate embeddings come out.

The names below are resolved on first use, so that ``tla_service.models.names`` can be read without importing torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tla_service.models.catalog import build_model
    from tla_service.models.classifier import ImageClassifier, LogitsOnly
    from tla_service.models.names import model_names
    from tla_service.models.output import ModelOutput

__all__ = ["ImageClassifier", "LogitsOnly", "ModelOutput", "build_model", "model_names"]

_HOMES = {
    "ImageClassifier": "tla_service.models.classifier",
    "LogitsOnly": "tla_service.models.classifier",
    "ModelOutput": "tla_service.models.output",
    "build_model": "tla_service.models.catalog",
    "model_names": "tla_service.models.names",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
