"""scikit-learn's handwritten digits: 1797 grey images of 8x8, embedded in the library."""

import torch

from tla_service.config import DataConfig
from tla_service.data.decoding import resized
from tla_service.data.sources import ArraySource, Splits
from tla_service.errors import UnavailableError

_SPLIT_SEED = 0


def load_digits(config: DataConfig) -> Splits:
    """Load the digits; values 0..16 become 0..255.

    The set has no test split. A fixed, stratified quarter (450 images) is the test set, the same for every seed of a
    run, so that results are comparable.

    Raises:
        UnavailableError: If scikit-learn is not installed.
    """
    try:
        from sklearn import datasets, model_selection
    except ImportError as error:
        remedy = "pip install scikit-learn"
        raise UnavailableError("data.name", "digits", "scikit-learn is not installed", remedy) from error
    bunch = datasets.load_digits()
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    pixels = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    train, test = model_selection.train_test_split(
        range(len(labels)), test_size=0.25, random_state=_SPLIT_SEED, stratify=labels.numpy()
    )
    if config.image_size is not None:
        pixels = resized(pixels, config.image_size)
    whole = ArraySource(pixels, labels)
    return Splits(
        whole.subset(torch.tensor(sorted(train))), whole.subset(torch.tensor(sorted(test))), tuple(map(str, range(10)))
    )
