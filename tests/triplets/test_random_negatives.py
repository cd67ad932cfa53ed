import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.triplets import oracle
from tla_service.triplets import mine_random, pick_positives


def chi_square(counts: list[int]) -> float:
    expected = sum(counts) / len(counts)
    return math.fsum((count - expected) ** 2 / expected for count in counts)


def draws(labels: list[int], pool_labels: list[int], *, any_class: bool, repeats: int) -> list[list[int]]:
    """How often each pool entry came up, for each anchor."""
    generator = torch.Generator().manual_seed(11)
    counts = [[0] * len(pool_labels) for _ in labels]
    repeated = torch.tensor(labels).repeat(repeats)
    found = mine_random(repeated, torch.tensor(pool_labels), generator, any_class=any_class)
    assert found.valid.all()
    for draw, index in enumerate(found.indices.tolist()):
        counts[draw % len(labels)][index] += 1
    return counts


def test_random_negatives_are_uniform_over_other_classes() -> None:
    labels, pool_labels = [0, 1, 5], [0, 1, 1, 2, 0, 2, 2, 1, 0, 1, 2]
    for label, counts in zip(labels, draws(labels, pool_labels, any_class=False, repeats=6000), strict=True):
        rows = oracle.candidates(label, pool_labels, None)
        assert sum(counts[row] for row in range(len(pool_labels)) if row not in rows) == 0
        # About ten degrees of freedom: a uniform draw exceeds this once in a million seeds.
        assert chi_square([counts[row] for row in rows]) < 50


def test_random_negatives_of_any_class_are_uniform_over_the_pool() -> None:
    pool_labels = [0, 1, 1, 2, 0, 2, 2, 1]
    for counts in draws([0, 1], pool_labels, any_class=True, repeats=6000):
        assert min(counts) > 0
        assert chi_square(counts) < 50


def test_anchors_draw_independently() -> None:
    found = mine_random(torch.zeros(4000), torch.ones(2), torch.Generator().manual_seed(1))
    pairs = found.indices.view(2000, 2)
    counts = [int(((pairs[:, 0] == a) & (pairs[:, 1] == b)).sum()) for a in (0, 1) for b in (0, 1)]
    assert chi_square(counts) < 35


def test_random_negatives_repeat_with_the_generator() -> None:
    labels, pool_labels = torch.randint(3, (50,)), torch.randint(3, (70,))
    first, again, other = (
        mine_random(labels, pool_labels, torch.Generator().manual_seed(seed)).indices for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_anchor_whose_class_fills_the_pool_is_invalid() -> None:
    found = mine_random(torch.tensor([2, 1]), torch.tensor([2, 2, 2]))
    assert found.valid.tolist() == [False, True]
    assert found.indices[0].item() == 0
    anyone = mine_random(torch.tensor([2, 1]), torch.tensor([2, 2, 2]), any_class=True)
    assert anyone.valid.tolist() == [True, True]


labels_of = st.lists(st.integers(0, 3), min_size=1, max_size=12)


@given(labels_of, labels_of, st.integers(0, 2**31), st.booleans())
def test_random_negative_of_any_case(labels: list[int], pool_labels: list[int], seed: int, any_class: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = mine_random(torch.tensor(labels), torch.tensor(pool_labels), generator, any_class=any_class)
    assert found.indices.dtype == torch.int64
    for label, index, valid in zip(labels, found.indices.tolist(), found.valid.tolist(), strict=True):
        rows = list(range(len(pool_labels))) if any_class else oracle.candidates(label, pool_labels, None)
        assert valid == bool(rows)
        assert index in rows if rows else index == 0


@pytest.mark.parametrize("extreme", [0.0, 1 - 2**-53])
def test_extreme_draws_stay_inside(monkeypatch: pytest.MonkeyPatch, extreme: float) -> None:
    def constant(size: int, **options: object) -> torch.Tensor:
        return torch.full((size,), extreme, dtype=torch.float64)

    monkeypatch.setattr(torch, "rand", constant)
    found = mine_random(torch.tensor([0]), torch.tensor([0, 1, 0, 1, 1, 0]))
    assert found.indices.tolist() == [1 if extreme == 0 else 4]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=15), st.data())
def test_positives_match_a_walk_round_the_pool(pool_labels: list[int], data: st.DataObject) -> None:
    own_rows = data.draw(st.lists(st.integers(0, len(pool_labels) - 1), min_size=1, max_size=15))
    labels = [pool_labels[row] for row in own_rows]
    found = pick_positives(torch.tensor(labels), torch.tensor(pool_labels), torch.tensor(own_rows))
    assert found.dtype == torch.int64
    expected = [oracle.next_of_class(label, pool_labels, row) for label, row in zip(labels, own_rows, strict=True)]
    assert found.tolist() == expected


def test_positives_by_hand() -> None:
    pool_labels = torch.tensor([0, 1, 0, 2, 1, 0])
    found = pick_positives(pool_labels, pool_labels, torch.arange(6))
    assert found.tolist() == [2, 4, 5, 3, 1, 0]


def test_positives_of_a_class_are_each_used_once() -> None:
    pool_labels = torch.randint(4, (60,))
    found = pick_positives(pool_labels, pool_labels, torch.arange(60))
    assert sorted(found.tolist()) == list(range(60))
    assert torch.equal(pool_labels[found], pool_labels)
    assert (found != torch.arange(60)).all()
