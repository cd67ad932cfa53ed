"""A packaged network that classifies images and says whether it trusts its answer."""

import hashlib
import json
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from tla_service.inference.detector import Rejector
from tla_service.inference.images import Images
from tla_service.models import Architecture, ImageClassifier

_BATCH_SIZE = 256  # bounds memory whatever the size of a request


class Predictor:
    """A network in eval mode and float32 with the content of its ``model.json`` and, if it has one, its detector."""

    def __init__(self, network: ImageClassifier, description: dict[str, Any], rejector: Rejector | None) -> None:
        self.network, self.description, self.rejector = network, description, rejector
        channels, height, width = description["image_shape"]
        self.image_shape: tuple[int, int, int] = (channels, height, width)
        # Versions of before this was described take images of the network's size only.
        self.resize: bool = description.get("preprocessing", {}).get("resize", False)
        self.class_names: tuple[str, ...] = tuple(description["class_names"])

    @classmethod
    def load(cls, artifacts: Path, device: str | None = None) -> Self:
        """Load a model version from its folder, by default to a GPU if present; ValueError if a file was changed."""
        from safetensors.numpy import load as load_arrays
        from safetensors.torch import load as load_tensors

        description = json.loads((artifacts / "model.json").read_text(encoding="utf-8"))
        architecture = Architecture.described(description, artifacts)
        network = architecture.build(description["num_classes"], tuple(description["image_shape"]))
        network.load_state_dict(load_tensors(_verified(artifacts, description["weights"])))
        facts = description["detector"]
        rejector = None if facts is None else Rejector.from_arrays(load_arrays(_verified(artifacts, facts)))
        target = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(network.float().eval().to(target), description, rejector)

    def predict(self, images: Images, *, embedding: bool = False) -> dict[str, npt.NDArray[Any]]:
        """Classify images (N,C,H,W), float32 in [0, 1] or uint8, as `tla_service.inference.images.read_images` gives.

        Returns:
            ``label`` int64 (N,) and ``probabilities`` float32 (N,K); with a detector ``detection_score`` float64 (N,),
            higher for images more like the training set, and ``accepted`` bool (N,), the score against the threshold;
            ``embedding`` float32 (N,D) on request.
        """
        starts = range(0, len(images), _BATCH_SIZE)
        parts = [self._batch(images[start : start + _BATCH_SIZE], embedding=embedding) for start in starts]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    @torch.inference_mode()
    def _batch(self, images: Images, *, embedding: bool) -> dict[str, npt.NDArray[Any]]:
        device = next(self.network.parameters()).device
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device)
        pixels = pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels
        output = self.network(pixels)
        probabilities = torch.softmax(output.logits.float(), dim=1).cpu().numpy()
        labels = output.logits.argmax(1).cpu().numpy()
        embeddings = output.embeddings.float().cpu().numpy()
        found = {"label": labels, "probabilities": probabilities}
        if self.rejector is not None:
            score = self.rejector.detector.score(embeddings, labels)
            found |= {"detection_score": score, "accepted": score >= self.rejector.threshold}
        return found | {"embedding": embeddings} if embedding else found


def _verified(artifacts: Path, facts: dict[str, Any]) -> bytes:
    """A file's content, if it has the digest that the description gives."""
    content = (artifacts / facts["file"]).read_bytes()
    if hashlib.sha256(content).hexdigest() != facts["sha256"]:
        raise ValueError(f"{facts['file']}: SHA-256 differs from the recorded one: the file was changed")
    return content
