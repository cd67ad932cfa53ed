"""The model registry: packages networks as MLflow model versions, loads, evaluates and promotes them."""

from tla_service.registry.loading import load_model

__all__ = ["load_model"]
