"""The model registry: packages networks as MLflow model versions, loads, evaluates and promotes them."""

from typing import Any

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    # Resolved on first use: settings in this package are read without torch.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tla_service.registry import loading

    return getattr(loading, name)
