"""AutoAugment, RandAugment and CutMix by torchvision, with draws of our own: imported where used, since it is slow."""

from collections import defaultdict

import torch
from torch import Tensor
from torchvision.transforms import v2

_AUTOAUGMENT, _AUTOAUGMENT_BINS = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10), 10
_RANDAUGMENT = v2.RandAugment()  # two operations of magnitude 9 of 31


def strongly_augmented(images: Tensor, kind: str, seed: int) -> Tensor:
    """AutoAugment (Cubuk et al. 2019), with its policy for CIFAR-10, or RandAugment (Cubuk et al. 2020).

    Images are (N, C, H, W), uint8, C 1 or 3. Operations, magnitudes and probabilities are torchvision's. Its
    transforms draw once for a whole batch; here every image has its own draws, and those with the same operation are
    changed together. The draws are made on the CPU, so that nothing waits for the device.
    """
    draws, images = torch.Generator().manual_seed(seed), images.clone()
    transform: v2.AutoAugment | v2.RandAugment
    if kind == "autoaugment":
        transform, bins = _AUTOAUGMENT, _AUTOAUGMENT_BINS
        choices = [list(operations) for operations in zip(*transform._policies, strict=True)]
        picks = [torch.randint(len(choices[0]), (len(images),), generator=draws).tolist()] * 2
    else:
        transform, bins = _RANDAUGMENT, _RANDAUGMENT.num_magnitude_bins
        choices = [[(name, 1.0, transform.magnitude) for name in transform._AUGMENTATION_SPACE]] * transform.num_ops
        picks = [torch.randint(len(each), (len(images),), generator=draws).tolist() for each in choices]
    for own, pick in zip(choices, picks, strict=True):
        applied, turned = torch.rand(2, len(images), generator=draws).tolist()
        groups: defaultdict[tuple[str, int | None, bool], list[int]] = defaultdict(list)
        for row, place in enumerate(pick):
            name, probability, level = own[place]
            if applied[row] <= probability:
                groups[name, level, transform._AUGMENTATION_SPACE[name][1] and turned[row] <= 0.5].append(row)
        for (name, level, is_negative), rows in groups.items():
            magnitudes = transform._AUGMENTATION_SPACE[name][0](bins, *images.shape[2:])
            magnitude = 0.0 if magnitudes is None else float(magnitudes[level])
            members, options = torch.tensor(rows, device=images.device), (transform.interpolation, transform._fill)
            given = images[members], name, -magnitude if is_negative else magnitude
            images[members] = transform._apply_image_or_video_transform(*given, *options)
    return images


def cut_and_mix(images: Tensor, labels: Tensor, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """CutMix (Yun et al. 2019): a box of the preceding image in each image (N, C, H, W), and its share of the label.

    There is one box per batch, whose share of the area is drawn from Beta(1, 1) before it is clipped to the image.
    Labels (N,), int64, become (N, K), of the images' type.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        mixed, shares = v2.CutMix(num_classes=num_classes)(images, labels)
    return mixed, shares.to(images.dtype)
