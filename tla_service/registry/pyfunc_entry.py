"""What MLflow runs to load a packaged network (models-from-code): copied into every model version as it is.

It imports only what a version ships beside it (``tla_service.inference``, ``tla_service.models``) and its pinned
requirements, so it works where this project is not installed.
"""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from tla_service.inference.images import BadImages, read_images
from tla_service.inference.predictor import Predictor


class Refusal(MlflowException):
    """Input that cannot be classified: status 400 when served.

    MLflow's server puts the input itself, all of it, before an error's message; a client needs the message alone.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)

    @property
    def message(self) -> str:
        """What is wrong, and what to send."""
        return str(self.args[0])

    @message.setter
    def message(self, _: str) -> None:
        """Keep the first one."""


class RobustClassifier(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined, misc]
    """Classifies images, and says which of its answers to trust."""

    def load_context(self, context: Any) -> None:
        """Build the network and load its weights and detector.

        Args:
            context: MLflow's; ``artifacts`` holds the path of ``model``, and the other files lie beside it.

        Raises:
            MlflowException: A file is not the one that the description was written for.
        """
        try:
            self.predictor = Predictor.load(Path(context.artifacts["model"]).parent)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(f"{error}; load another version") from error

    # MLflow reads the input's annotation and warns of every one it does not know; it passes over this one.
    def predict(
        self,
        context: Any,  # noqa: ARG002 - MLflow passes all
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Classify images.

        Args:
            context: MLflow's, unused.
            model_input: Images in any form that :func:`tla_service.inference.images.read_images` takes.
            params: ``embedding``: whether to return the embeddings as well.

        Returns:
            As :meth:`tla_service.inference.predictor.Predictor.predict`.

        Raises:
            MlflowException: The images cannot be classified (HTTP 400 when served).
        """
        try:
            images = read_images(model_input, self.predictor.image_shape)
        except BadImages as error:
            raise Refusal(str(error)) from None
        return self.predictor.predict(images, embedding=bool((params or {}).get("embedding", False)))


mlflow.models.set_model(RobustClassifier())
