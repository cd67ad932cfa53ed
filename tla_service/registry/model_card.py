"""The page that travels with a model version: what it is, how well it does, and what it must not be trusted with."""

import math
from collections.abc import Mapping, Sequence
from typing import Any


def model_card(description: Mapping[str, Any]) -> str:
    """Write the card.

    Args:
        description: The content of ``model.json``.

    Returns:
        Markdown.
    """
    threat = description["threat_model"]
    detector = description["detector"]
    channels, height, width = description["image_shape"]
    lines = [
        f"# {description['architecture']}, {_training(description['method'])}",
        "",
        f"Classifies {channels}x{height}x{width} images (float32 in [0, 1]) into {description['num_classes']} classes: "
        + _listed(description["class_names"])
        + ".",
        "",
        "## Robustness",
        "",
        f"Trained against perturbations of {_radius(threat)}. Figures on the test set:",
        "",
        "| measure | value |",
        "|---|---|",
        *(f"| {name} | {_shown(name, value)} |" for name, value in sorted(description["metrics"].items())),
        "",
        "Robust accuracy is measured by attacks, so it is an upper bound: a stronger attack may lower it. Nothing is "
        "claimed about other norms, larger radii, corruptions, or images unlike the training set.",
        "",
        "## Use",
        "",
        "```python",
        "import mlflow",
        'model = mlflow.pyfunc.load_model("models:/NAME/VERSION")',
        "answer = model.predict(images)  # (N, C, H, W) float32 in [0, 1] or uint8, or a list of PNG or JPEG bytes",
        'answer["label"], answer["probabilities"]  # int64 (N,), float32 (N, K)',
        *(['answer["detection_score"], answer["accepted"]  # float64 (N,), bool (N,)'] if detector else []),
        'model.predict(images, params={"embedding": True})["embedding"]  # float32 (N, D)',
        "```",
        "",
        "## Trust",
        "",
        *_trust(detector),
        "",
        "## Origin",
        "",
        *(f"- {name}: {value}" for name, value in sorted(description["facts"].items())),
        f"- run key: {description['run_key']}",
        *([f"- configuration digest: {description['config_digest']}"] if description["config_digest"] else []),
        f"- weights SHA-256: `{description['weights']['sha256']}`",
        "",
    ]
    return "\n".join(lines)


def _training(method: str) -> str:
    return "trained elsewhere" if method == "imported" else f"trained with {method}"


def _trust(detector: Mapping[str, Any] | None) -> list[str]:
    if detector is None:
        return ["This version holds no detector of misclassified images."]
    return [
        "`detection_score` is the log density of an image's embedding under Gaussians fitted to "
        f"{detector['training_images']} training images. `accepted` is false where it is below "
        f"{detector['threshold']:.6g}. This threshold rejects at most {detector['false_rejection_rate']:.2%} of the "
        f"correctly classified ones among {detector['validation_images']} validation images that were not trained on. "
        "An attacker who knows the detector can aim at it as well."
    ]


def _radius(threat: Mapping[str, Any]) -> str:
    epsilon = float(threat["epsilon"])
    levels = epsilon * 255
    near_level = math.isclose(levels, round(levels), abs_tol=1e-6)
    size = f"{round(levels)}/255" if near_level else f"{epsilon:g}"
    norm = {"linf": "L-infinity", "l2": "L2"}.get(threat["norm"], threat["norm"])
    return f"{norm} norm up to {size}, pixels in [0, 1]"


def _shown(name: str, value: float) -> str:
    return f"{value:.2%}" if "accuracy" in name else f"{value:.6g}"


def _listed(names: Sequence[str], limit: int = 20) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
