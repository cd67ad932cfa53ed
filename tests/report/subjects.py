"""A small network that is trained in a second, and its data, for tests of the report."""

from functools import cache

import torch
from torch import nn

from tla_service.config import DataConfig
from tla_service.data import Dataset, load_dataset
from tla_service.models import build_model
from tla_service.report.settings import EvaluateSettings


@cache
def digits() -> Dataset:
    return load_dataset(DataConfig(train_limit=600, test_limit=60))


@cache
def trained(seed: int = 0) -> nn.Module:
    """A digits network after some steps of ordinary training."""
    torch.manual_seed(seed)
    data = digits()
    network = build_model("digits_cnn", 10, data.image_shape)
    rows = torch.arange(len(data.train))
    images, labels = data.train.fetch(rows).float() / 255, data.train.labels[rows]
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(25):
        chosen = torch.randint(len(rows), (128,))
        loss = nn.functional.cross_entropy(network(images[chosen]).logits, labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def settings(**changes: object) -> EvaluateSettings:
    """An evaluation of few images."""
    counts = {"autoattack": 20, "curves": 20, "sparse": 10, "audit": 0, "representation": 60, "bank": 200}
    counts["certified"] = 20
    fields = {
        "model": "models:/tla-digits/1",
        "batch_size": 25,
        "images": counts,
        "attacks": {"fgsm": {"kind": "fgsm"}, "pgd5x2": {"num_steps": 5, "num_restarts": 2, "step_size": 0.05}},
        "detection": {"num_steps": 5},
        "certificate": {"samples": 100},
        "neighbours": {"k": 5},
    }
    return EvaluateSettings.model_validate(fields | changes)
