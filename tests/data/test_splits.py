"""Validation splits and limits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tla_service.data.splits import gate_images, split_validation, stratified_subset
from tla_service.errors import ConfigError


@settings(deadline=None, max_examples=30)
@given(
    per_class=st.lists(st.integers(8, 40), min_size=2, max_size=5),
    fraction=st.floats(0.2, 0.5),
    seed=st.integers(0, 9),
)
def test_validation_is_disjoint_covering_and_stratified(per_class: list[int], fraction: float, seed: int) -> None:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(per_class)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))]
    train, validation = split_validation(labels, fraction, seed)

    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(len(labels)))
    assert train.tolist() == sorted(train.tolist())
    assert validation.tolist() == sorted(validation.tolist())
    assert train.dtype == validation.dtype == torch.int64
    for label, count in enumerate(per_class):
        assert abs(int((labels[validation] == label).sum()) - fraction * count) <= 1.5


def test_the_split_is_a_function_of_the_seed() -> None:
    labels = torch.arange(100) % 4
    assert torch.equal(split_validation(labels, 0.1, 3)[1], split_validation(labels, 0.1, 3)[1])
    assert not torch.equal(split_validation(labels, 0.1, 3)[1], split_validation(labels, 0.1, 4)[1])


def test_a_class_of_one_image_is_named() -> None:
    labels = torch.tensor([0, 0, 0, 2, 3, 3, 5])
    names = ["cat", "dog", "eel", "fox", "gnu", "hen"]
    reason = r"data\.validation_fraction=0\.5: each of the classes 'eel', 'hen' has a single training image"
    with pytest.raises(ConfigError, match=reason):
        split_validation(labels, 0.5, 0, names)
    with pytest.raises(ConfigError, match=r"class 'eel' has a single training image, .*; add images, remove the class"):
        split_validation(labels[:-1], 0.5, 0, names)
    with pytest.raises(ConfigError, match=r"class 2 has a single training image"):
        split_validation(labels[:-1], 0.5, 0)


@settings(deadline=None, max_examples=30)
@given(classes=st.integers(2, 1500), per_class=st.integers(2, 9), extra=st.integers(0, 50))
def test_the_share_that_is_asked_for_is_enough(classes: int, per_class: int, extra: int) -> None:
    labels = torch.arange(classes * per_class + extra) % classes
    with pytest.raises(ConfigError) as caught:
        split_validation(labels, 1e-6, 0)
    asked = float(caught.value.remedy.rpartition(" ")[2])
    train, validation = split_validation(labels, asked, 0)
    assert len(validation) >= classes
    assert len(train) >= classes


@pytest.mark.parametrize("labels", [[0, 0, 0, 1], [0] * 30 + [1] * 30, []])
def test_what_cannot_be_split_is_refused(labels: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"data\.validation_fraction=0\.01"):
        split_validation(torch.tensor(labels, dtype=torch.int64), 0.01, 0)


@settings(deadline=None, max_examples=50)
@given(labels=st.lists(st.integers(0, 5), min_size=1, max_size=80), count=st.integers(1, 90))
def test_limits_keep_shares_and_are_nested(labels: list[int], count: int) -> None:
    classes = torch.tensor(labels)
    chosen = stratified_subset(classes, count)

    assert len(chosen) == min(count, len(labels)) == len(set(chosen.tolist()))
    assert chosen.tolist() == sorted(chosen.tolist())
    assert set(chosen.tolist()) <= set(stratified_subset(classes, count + 1).tolist())
    for label in set(labels):
        expected = labels.count(label) * len(chosen) / len(labels)
        # Each class's own rounding, and as many ties as there are other classes.
        assert abs(int((classes[chosen] == label).sum()) - expected) < len(set(labels)) + 1


def test_ties_do_not_favour_the_first_classes() -> None:
    labels = torch.arange(1000) % 100
    chosen = labels[stratified_subset(labels, 50)]
    assert len(set(chosen.tolist())) == 50
    assert 30 < float(chosen.float().mean()) < 70


@settings(deadline=None, max_examples=30)
@given(per_class=st.lists(st.integers(0, 60), min_size=1, max_size=6).filter(any), count=st.integers(1, 400))
def test_images_of_the_gate_are_a_quarter_of_each_class_and_of_each_subset(per_class: list[int], count: int) -> None:
    labels = torch.cat([torch.full((size,), label) for label, size in enumerate(per_class)])
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(count))]
    gate = gate_images(labels)
    assert torch.equal(gate, gate_images(labels))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[stratified_subset(labels, count)] = True
    for label in range(len(per_class)):
        for rows in (labels == label, chosen & (labels == label)):
            # Of every four images of a class one is the gate's, and never the first.
            assert int(rows.sum()) // 4 <= int((gate & rows).sum()) <= (int(rows.sum()) + 2) // 4
    first = stratified_subset(labels, 1)
    assert not gate[first].any()
