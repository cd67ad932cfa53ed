"""What a version ships scores as what was fitted, on the same scale as the learned metric."""

import numpy as np
import pytest
from safetensors.numpy import load, save

from tests.evaluation.test_detection import embedded
from tla_service import triplets
from tla_service.evaluation.detection import fit_detector
from tla_service.inference import detector


def test_directions_of_zeros_are_defined_as_in_the_learned_metric() -> None:
    assert detector.SMALLEST_SQUARE == triplets.SMALLEST_SQUARE


@pytest.mark.parametrize("covariance", ["tied", "full", "diagonal"])
def test_a_rejector_crosses_a_file_unchanged(covariance: str) -> None:
    fitted = detector.Rejector(fit_detector(embedded([0, 1, 2] * 9), covariance=covariance), -3.25, 0.05, 27, 9)
    again = detector.Rejector.from_arrays(load(save(fitted.to_arrays())))
    assert (again.threshold, again.false_rejection_rate) == (-3.25, 0.05)
    assert (again.training_images, again.validation_images) == (27, 9)
    test = embedded([0, 1, 2, 2], seed=4)
    np.testing.assert_array_equal(
        again.detector.score(test.embeddings, test.predictions),
        fitted.detector.score(test.embeddings, test.predictions),
    )
