"""Strong augmentation against torchvision's transforms of each image alone; CutMix against its definition."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from tla_service.config import DataConfig
from tla_service.data.augmentation import augment
from tla_service.data.strong import cut_and_mix, strongly_augmented

TRANSFORMS: dict[str, Any] = {
    "autoaugment": v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10),
    "randaugment": v2.RandAugment(),
}


def pictures(count: int, channels: int = 3) -> Tensor:
    draws = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, 8, 10), dtype=torch.uint8, generator=draws)


def numbers_for(kind: str, count: int, seed: int) -> list[list[Tensor]]:
    """The draws of each image in the order in which torchvision's transform of it asks for them."""
    transform, draws = TRANSFORMS[kind], torch.Generator().manual_seed(seed)
    space = transform._AUGMENTATION_SPACE
    if kind == "autoaugment":
        policies = torch.randint(25, (count,), generator=draws)
        asked = [[policies[image]] for image in range(count)]
        names = [[operation[:2] for operation in transform._policies[policy]] for policy in policies]
    else:
        chosen = [torch.randint(14, (count,), generator=draws) for _ in range(2)]
        asked = [[] for _ in range(count)]
        names = [[(list(space)[int(each[image])], 1.0) for each in chosen] for image in range(count)]
    for place in range(2):
        applied, turned = torch.rand(2, count, generator=draws)
        for image in range(count):
            name, probability = names[image][place]
            if kind == "randaugment":
                asked[image].append(chosen[place][image])
            else:
                asked[image].append(applied[image])
            if applied[image] <= probability and space[name][1]:
                asked[image].append(turned[image])
    return asked


@pytest.mark.parametrize("kind", TRANSFORMS)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_is_changed_as_torchvision_changes_it_alone(
    kind: str, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = pictures(150, channels)
    found = strongly_augmented(images, kind, 5)
    assert (found != images).flatten(1).any(1).float().mean() > 0.5
    for image, result, numbers in zip(images, found, numbers_for(kind, 150, 5), strict=True):
        feed: Iterator[Tensor] = iter(numbers)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", lambda *_, feed=feed: next(feed))
            patch.setattr(torch, "randint", lambda *_, feed=feed: next(feed))
            alone = TRANSFORMS[kind](image)
        assert torch.equal(result, alone)
        assert next(feed, None) is None


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_draws_are_those_of_the_seed_and_leave_torchs_own_alone(kind: str) -> None:
    images = pictures(1).expand(60, -1, -1, -1)
    before, state = images.clone(), torch.get_rng_state()
    config, draws = DataConfig.model_validate({"augment": kind}), torch.Generator()
    first, again, other = (augment(images, config, draws.manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({tuple(image.flatten().tolist()) for image in first}) > 20  # each image has draws of its own
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(augment(images, config, draws, strongly=False), images.float() / 255)


def test_cutmix_puts_a_box_of_the_preceding_image_and_its_share_of_the_label() -> None:
    count, height, width = 5, 8, 10
    images = torch.arange(count, dtype=torch.float32)[:, None, None, None].expand(count, 3, height, width)
    labels, state = torch.tensor([0, 3, 1, 0, 3]), torch.get_rng_state()
    shares = set()
    for seed in range(40):
        mixed, soft = cut_and_mix(images, labels, 4, seed)
        boxes = set()
        for row in range(count):
            inside = {(y, x) for y in range(height) for x in range(width) if mixed[row, 0, y, x] == (row - 1) % count}
            outside = {(y, x) for y in range(height) for x in range(width) if mixed[row, 0, y, x] == row}
            assert len(inside) + len(outside) == height * width
            rows, columns = ({place[axis] for place in inside} for axis in (0, 1))
            assert len(inside) == len(rows) * len(columns)  # a box
            assert torch.equal(mixed[row, 0], mixed[row, 2])
            expected = [0.0] * 4
            expected[labels[row]] += len(outside) / (height * width)
            expected[labels[row - 1]] += len(inside) / (height * width)
            assert soft[row].tolist() == pytest.approx(expected, abs=1e-6)
            boxes.add(frozenset(inside))
        assert len(boxes) == 1
        shares.add(len(boxes.pop()))
        assert torch.equal(cut_and_mix(images, labels, 4, seed)[0], mixed)
    assert len(shares) > 10
    assert torch.equal(torch.get_rng_state(), state)
