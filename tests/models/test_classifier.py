import numpy as np
import pytest
import torch

from tla_service.models.classifier import ChannelNormalization, PerImageStandardization


def _standardize_like_tensorflow(images: np.ndarray) -> np.ndarray:
    standardized = np.empty_like(images)
    for index, image in enumerate(images):
        standardized[index] = (image - image.mean()) / max(image.std(), 1.0 / np.sqrt(image.size))
    return standardized


@pytest.fixture
def images() -> np.ndarray:
    """Two noisy images, one constant, one whose deviation is below the bound for [0, 1] but above it for [0, 255]."""
    generator = np.random.default_rng(0)
    batch = generator.uniform(0, 1, (4, 3, 6, 5))
    batch[2] = 0.4
    batch[3] = 0.5 + generator.uniform(-0.01, 0.01, (3, 6, 5))
    return batch


def test_per_image_is_tensorflow_on_byte_pixels(images: np.ndarray) -> None:
    standardized = PerImageStandardization()(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(standardized, _standardize_like_tensorflow(images * 255.0), atol=1e-9)
    assert not np.allclose(standardized[3], _standardize_like_tensorflow(images)[3])


def test_per_image_gradient_of_a_constant_image_is_finite() -> None:
    images = torch.full((1, 1, 4, 4), 0.5, requires_grad=True)
    PerImageStandardization()(images).square().sum().backward()
    assert images.grad is not None
    assert torch.isfinite(images.grad).all()


def test_per_image_gradient_agrees_with_finite_differences() -> None:
    images = torch.rand(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(PerImageStandardization(), images)


def test_channel_normalization() -> None:
    images = torch.rand(2, 2, 3, 3, dtype=torch.float64)
    normalized = ChannelNormalization((0.25, 0.5), (0.5, 0.125)).double()(images).numpy()
    expected = (images.numpy() - np.array([0.25, 0.5])[:, None, None]) / np.array([0.5, 0.125])[:, None, None]
    np.testing.assert_allclose(normalized, expected, rtol=1e-12)
