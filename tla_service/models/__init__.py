"""Networks: images in [0, 1] go in, logits and penultimate embeddings come out."""

from tla_service.models.catalog import Architecture, build_model, model_names
from tla_service.models.classifier import ImageClassifier, LogitsOnly, ModelOutput

__all__ = ["Architecture", "ImageClassifier", "LogitsOnly", "ModelOutput", "build_model", "model_names"]
