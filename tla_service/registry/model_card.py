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
    channels, height, width = description["image_shape"]
    lines = [
        f"# {description['architecture']} trained with {description['method']}",
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
        'model.predict(images)  # float32 (N, C, H, W) in [0, 1] -> {"label", "probabilities"}',
        "```",
        "",
        "## Origin",
        "",
        *(f"- {name}: {value}" for name, value in sorted(description["facts"].items())),
        f"- run key: {description['run_key']}",
        f"- configuration digest: {description['config_digest']}",
        f"- weights SHA-256: `{description['weights']['sha256']}`",
        "",
    ]
    return "\n".join(lines)


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
