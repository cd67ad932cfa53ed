"""The model card that is part of a packaged model."""

from collections.abc import Mapping, Sequence
from typing import Any

from tla_service.report.schema import ThreatModel

_NORMS = {"linf": "L-infinity", "l2": "L2"}


def model_card(description: Mapping[str, Any]) -> str:
    """The card in Markdown, from the content of ``model.json``."""
    threat, detector = ThreatModel.model_validate(description["threat_model"]), description["detector"]
    channels, height, width = description["image_shape"]
    method = description["method"]
    lines = [
        f"# {description['architecture']}, " + ("imported" if method == "imported" else f"trained with {method}"),
        "",
        f"Classifies {channels}x{height}x{width} images (float32 in [0, 1]) into {description['num_classes']} classes: "
        + _listed(description["class_names"])
        + ".",
        "",
        "## Robustness",
        "",
        f"Trained against perturbations of {_NORMS[threat.norm]} norm up to {threat.radius}, pixels in [0, 1]. Test "
        "set results:",
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {name} | {_shown(name, value)} |" for name, value in sorted(description["metrics"].items())),
        "",
        "Robust accuracy is an upper bound: a stronger attack may lower it. It does not extend to other norms, larger "
        "radii, image corruptions, or images outside the training distribution.",
        "",
        "## Usage",
        "",
        "```python",
        "import mlflow",
        'model = mlflow.pyfunc.load_model("models:/NAME/VERSION")',
        "output = model.predict(images)  # (N, C, H, W) float32 in [0, 1] or uint8, or a list of PNG or JPEG bytes",
        'output["label"], output["probabilities"]  # int64 (N,), float32 (N, K)',
        *(['output["detection_score"], output["accepted"]  # float64 (N,), bool (N,)'] if detector else []),
        'model.predict(images, params={"embedding": True})["embedding"]  # float32 (N, D)',
        "```",
        "",
        "## Detection of misclassified images",
        "",
        _detection(detector),
        "",
        "## Provenance",
        "",
        *(f"- {name}: {value}" for name, value in sorted(description["facts"].items())),
        f"- run key: {description['run_key']}",
        *([f"- configuration digest: {description['config_digest']}"] if description["config_digest"] else []),
        f"- weights SHA-256: `{description['weights']['sha256']}`",
        "",
    ]
    return "\n".join(lines)


def _detection(detector: Mapping[str, Any] | None) -> str:
    if detector is None:
        return "This model has no detector of misclassified images."
    return (
        "`detection_score` is the log density of an image's embedding under Gaussians fitted to "
        f"{detector['training_images']} training images. `accepted` is false below a score of "
        f"{detector['threshold']:.6g}, a threshold that rejects at most {detector['false_rejection_rate']:.2%} of the "
        f"correctly classified images among {detector['validation_images']} held-out validation images. An attacker "
        "who knows the detector can evade it."
    )


def _shown(name: str, value: float) -> str:
    return f"{value:.2%}" if "accuracy" in name else f"{value:.6g}"


def _listed(names: Sequence[str], limit: int = 20) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
