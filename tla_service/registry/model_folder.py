"""The folder of a packaged network: safetensors, a description, a model card, its code, and a manifest."""

import importlib.metadata
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

import tla_service
from tla_service.inference.detector import Rejector
from tla_service.registry.integrity import sha256, write_manifest
from tla_service.registry.model_card import model_card

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from mlflow.models.model import Model

_SHIPPED = ("__init__.py", "errors.py", "models", "inference")
_REQUIREMENTS = ("mlflow", "numpy", "pillow", "safetensors", "torch", "torchvision")
_METADATA = ("architecture", "method", "threat_model", "class_names", "image_shape", "detector")
_ENTRY = Path(__file__).with_name("pyfunc_entry.py")


def write_source(
    folder: Path, description: Mapping[str, Any], state_dict: Mapping[str, torch.Tensor], rejector: Rejector | None
) -> dict[str, Any]:
    """Write weights, detector, description, model card and code to a new folder; returns the complete description."""
    from safetensors.numpy import save_file as save_arrays
    from safetensors.torch import save_file

    folder.mkdir()
    weights = folder / "weights.safetensors"
    save_file({name: _storable(tensor) for name, tensor in state_dict.items()}, weights)
    description = {**description, "weights": {"file": weights.name, "sha256": sha256(weights)}, "detector": None}
    if rejector is not None:
        detector = folder / "detector.safetensors"
        save_arrays(rejector.to_arrays(), detector)
        description["detector"] = {
            "file": detector.name,
            "sha256": sha256(detector),
            "threshold": rejector.threshold,
            "false_rejection_rate": rejector.false_rejection_rate,
            "training_images": rejector.training_images,
            "validation_images": rejector.validation_images,
        }
    (folder / "model.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
    (folder / "model_card.md").write_text(model_card(description), encoding="utf-8")
    package = folder / "code" / "tla_service"
    package.mkdir(parents=True)
    home = Path(tla_service.__file__).parent
    for name in _SHIPPED:
        if (home / name).is_dir():
            shutil.copytree(home / name, package / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy(home / name, package / name)
    return description


def save_folder(model: "Model", source: Path, folder: Path, example: npt.NDArray[np.float32]) -> str:
    """Write MLflow's model folder from `source`, which `write_source` wrote; returns its manifest's SHA-256."""
    with warnings.catch_warnings():
        # MLflow warns about a type hint of its own on import.
        warnings.filterwarnings("ignore", message=".*Any type hint is inferred as AnyType")
        import mlflow.pyfunc

    description = json.loads((source / "model.json").read_text(encoding="utf-8"))
    names = {"weights": "weights.safetensors", "model": "model.json", "card": "model_card.md"}
    if description["detector"] is not None:
        names["detector"] = description["detector"]["file"]
    logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
    path_before = list(sys.path)
    try:
        mlflow.pyfunc.save_model(
            path=str(folder),
            mlflow_model=model,
            python_model=str(_ENTRY),
            code_paths=[str(source / "code" / "tla_service")],
            artifacts={name: str(source / file) for name, file in names.items()},
            signature=_signature(description),
            metadata={name: description[name] for name in _METADATA},
            input_example=np.ascontiguousarray(example, dtype=np.float32),
            pip_requirements=_requirements(),
        )
    finally:
        sys.path[:] = path_before  # MLflow adds folders that are about to be deleted
    # MLflow records paths of this machine, and a cloudpickle version although nothing is pickled.
    flavor = model.flavors["python_function"]
    flavor.pop("cloudpickle_version", None)
    flavor["model_code_path"] = _ENTRY.name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    model.save(str(folder / "MLmodel"))
    for cache in list(folder.rglob("__pycache__")):
        shutil.rmtree(cache)
    return write_manifest(folder)


def _requirements() -> list[str]:
    """Pinned to the installed versions; without ``+cpu`` and ``+cu130``, which PyPI does not have."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in _REQUIREMENTS]


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 (or integer) copy that shares no memory, as safetensors requires."""
    kept = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype)
    return kept.clone(memory_format=torch.contiguous_format)


def _signature(description: Mapping[str, Any]) -> "ModelSignature":
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    outputs = [
        TensorSpec(np.dtype(np.int64), (-1,), "label"),
        TensorSpec(np.dtype(np.float32), (-1, description["num_classes"]), "probabilities"),
    ]
    if description["detector"] is not None:
        outputs.append(TensorSpec(np.dtype(np.float64), (-1,), "detection_score"))
        outputs.append(TensorSpec(np.dtype(np.bool_), (-1,), "accepted"))
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *description["image_shape"]))]),
        outputs=Schema([*outputs]),
        params=ParamSchema([ParamSpec("embedding", "boolean", default=False)]),
    )
    # Tells MLflow that `predict` validates its input itself: a tensor schema cannot express "float32, uint8 or encoded
    # images", and MLflow would reject the other types.
    signature._is_signature_from_type_hint = True
    return signature
