"""The models-from-code script of MLflow, copied into every version: it imports only the code and packages in that."""

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from tla_service.inference.images import BadImages, read_images
from tla_service.inference.predictor import Predictor


class Refusal(MlflowException):
    """Invalid input; status 400 when served. MLflow's server would put the whole input before the message."""

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
    """Classifies images, and flags likely misclassifications."""

    def load_context(self, context: Any) -> None:
        """Load the network and its detector; raises `MlflowException` if a file was modified."""
        try:
            self.predictor = Predictor.load(Path(context.artifacts["model"]).parent)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(f"{error}; load another version") from error

    # MLflow warns about type hints of the input that it does not know; not about this one.
    def predict(
        self,
        context: Any,  # noqa: ARG002 - part of MLflow's interface
        model_input: np.ndarray,
        params: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Classify images: see :func:`tla_service.inference.images.read_images` for the forms of the input.

        ``params={"embedding": True}`` returns the embeddings as well. Invalid images raise `Refusal`.
        """
        try:
            images = read_images(model_input, self.predictor.image_shape, resize=self.predictor.resize)
        except BadImages as error:
            raise Refusal(str(error)) from None
        return self.predictor.predict(images, embedding=bool((params or {}).get("embedding", False)))


mlflow.models.set_model(RobustClassifier())
