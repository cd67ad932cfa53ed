"""The detector of a run: fitted to training images, its threshold fixed on validation images, and never fatal."""

import logging

import numpy as np
import pytest
import torch

from tla_service.config import RunConfig
from tla_service.data import load_dataset, split_validation
from tla_service.inference.detector import Rejector
from tla_service.models import build_model
from tla_service.training.rejector import fit_rejector

CPU = torch.device("cpu")


def test_the_threshold_rejects_the_stated_share_of_validation_images() -> None:
    config = RunConfig.model_validate({"detection": {"false_rejection_rate": 0.2, "training_limit": 700}})
    dataset = load_dataset(config.data)
    train, validation = split_validation(dataset.train.labels, 0.1, 0)
    network = build_model("digits_cnn", 10, (1, 8, 8)).eval()
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    images = dataset.train.fetch(train).float() / 255
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images).logits, dataset.train.labels[train]).backward()
        optimizer.step()
    rejector = Rejector.from_arrays(
        fit_rejector(network, (dataset.train, train), (dataset.train, validation), config, CPU)
    )
    assert (rejector.training_images, rejector.validation_images) == (700, len(validation))
    with torch.no_grad():
        output = network(dataset.train.fetch(validation).float() / 255)
    found = rejector.detector.log_densities(output.embeddings.numpy()).max(1)
    right = (output.logits.argmax(1) == dataset.train.labels[validation]).numpy()
    rejected = (found[right] < rejector.threshold).mean()
    assert 0.2 - 1 / right.sum() <= rejected <= 0.2
    assert np.isclose(found[right], rejector.threshold).any()


@pytest.mark.parametrize("weight", [0.0, float("nan")])
def test_a_network_that_tells_nothing_apart_gets_no_detector(weight: float, caplog: pytest.LogCaptureFixture) -> None:
    config = RunConfig()
    dataset = load_dataset(config.data)
    train, validation = split_validation(dataset.train.labels, 0.1, 0)
    network = build_model("digits_cnn", 10, (1, 8, 8)).eval()
    torch.nn.init.constant_(network.hidden.weight, weight)
    with caplog.at_level(logging.WARNING):
        assert fit_rejector(network, (dataset.train, train), (dataset.train, validation), config, CPU) == {}
    assert "without a detector" in caplog.text
