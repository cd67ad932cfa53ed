"""What MLflow runs to load a packaged network (models-from-code): copied into every model version as it is.

It imports only what a version ships beside it (``tla_service.models``, ``tla_service.errors``) and its pinned
requirements, so it works where this project is not installed.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import torch
from mlflow.exceptions import MlflowException
from safetensors.torch import load_file

from tla_service.models import build_model

_BATCH_SIZE = 256  # bounds memory whatever the size of a request
_SURELY_8_BIT = 2.0


class RobustClassifier(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined, misc]
    """Classifies images: label and class probabilities."""

    def load_context(self, context: Any) -> None:
        """Build the network and load its weights.

        Args:
            context: MLflow's; ``artifacts`` holds the paths of ``weights`` and ``model``.

        Raises:
            MlflowException: The weights are not those the description was written for.
        """
        weights = Path(context.artifacts["weights"])
        self.description = json.loads(Path(context.artifacts["model"]).read_text(encoding="utf-8"))
        expected = self.description["weights"]["sha256"]
        if hashlib.sha256(weights.read_bytes()).hexdigest() != expected:
            raise MlflowException.invalid_parameter_value(
                f"{weights.name}: SHA-256 differs from the recorded one: the file was changed; load another version"
            )
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.image_shape = tuple(self.description["image_shape"])
        network = build_model(
            self.description["architecture"],
            self.description["num_classes"],
            self.image_shape,
            self.description["normalization"],
        )
        network.load_state_dict(load_file(weights))
        self.network = network.float().eval().to(self.device)

    # MLflow reads this annotation, and warns of every one it does not know, such as numpy.typing's.
    def predict(
        self,
        context: Any,  # noqa: ARG002
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,  # noqa: ARG002 - MLflow passes all
    ) -> dict[str, npt.NDArray[Any]]:
        """Classify images.

        Args:
            context: MLflow's, unused.
            model_input: Images (N,C,H,W), float32 in [0, 1].
            params: Unused.

        Returns:
            ``label`` int64 (N,) and ``probabilities`` float32 (N,K).

        Raises:
            MlflowException: The images have the wrong shape, hold NaN, or leave [0, 1] (HTTP 400 when served).
        """
        images = self._checked(model_input)
        parts = []
        with torch.inference_mode():
            for start in range(0, len(images), _BATCH_SIZE):
                batch = torch.from_numpy(images[start : start + _BATCH_SIZE]).to(self.device)
                parts.append(torch.softmax(self.network(batch).logits.float(), dim=1).cpu().numpy())
        probabilities = np.concatenate(parts)
        return {"label": probabilities.argmax(axis=1).astype(np.int64), "probabilities": probabilities}

    def _checked(self, model_input: Any) -> npt.NDArray[np.float32]:
        wanted = f"(N, {', '.join(map(str, self.image_shape))})"
        images = np.ascontiguousarray(model_input)
        if images.ndim != 1 + len(self.image_shape) or images.shape[1:] != self.image_shape:
            raise MlflowException.invalid_parameter_value(f"images have shape {images.shape}; send {wanted}")
        if len(images) == 0:
            raise MlflowException.invalid_parameter_value("there are no images; send at least one")
        if not np.issubdtype(images.dtype, np.floating):
            raise MlflowException.invalid_parameter_value(f"images are {images.dtype}; send float32 in [0, 1]")
        if not np.isfinite(images).all():
            raise MlflowException.invalid_parameter_value("images hold NaN or infinite values; send numbers in [0, 1]")
        low, high = float(images.min()), float(images.max())
        if low < 0 or high > 1:
            hint = "; divide 8-bit values by 255" if high >= _SURELY_8_BIT else ""
            raise MlflowException.invalid_parameter_value(f"images range over [{low:g}, {high:g}]; send [0, 1]{hint}")
        return images.astype(np.float32, copy=False)


mlflow.models.set_model(RobustClassifier())
