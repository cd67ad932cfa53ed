import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.triplets import oracle
from tla_service import triplets
from tla_service.triplets import Negatives, mine_hardest


def check_against_loop(
    found: Negatives,
    anchors: Tensor,
    labels: Tensor,
    pool: Tensor,
    pool_labels: Tensor,
    *,
    absolute: bool,
    keep: Tensor | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Each anchor's negative is allowed, and no allowed entry is closer by more than rounding."""
    assert found.indices.dtype == torch.int64
    assert found.valid.dtype == torch.bool
    assert found.indices.shape == found.valid.shape == (len(anchors),)
    for i, anchor in enumerate(anchors.tolist()):
        rows = oracle.candidates(int(labels[i]), pool_labels.tolist(), None if keep is None else keep[i].tolist())
        assert found.valid[i].item() == bool(rows)
        if not rows:
            assert found.indices[i].item() == 0
            continue
        chosen = int(found.indices[i])
        assert chosen in rows
        _, best = oracle.hardest(anchor, pool.tolist(), rows, absolute=absolute)
        similarity = oracle.cosine(anchor, pool[chosen].tolist())
        assert (abs(similarity) if absolute else similarity) == pytest.approx(best, abs=tolerance)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("anchors", "pool"), [(1, 1), (1, 200), (90, 1), (90, 2), (7, 33), (33, 7)])
def test_hardest_matches_loop(absolute: bool, dtype: torch.dtype, anchors: int, pool: int) -> None:
    first, second = torch.randn(anchors, 6, dtype=dtype), torch.randn(pool, 6, dtype=dtype)
    labels, pool_labels = torch.randint(3, (anchors,)), torch.randint(3, (pool,))
    keep = torch.rand(anchors, pool) < 0.5
    for mask in (None, keep):
        found = mine_hardest(first, labels, second, pool_labels, absolute=absolute, keep=mask)
        check_against_loop(found, first, labels, second, pool_labels, absolute=absolute, keep=mask)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, bool]:
    """Few directions and few classes, so that duplicates, zeros, opposites and missing classes are common."""
    width, anchors, pool = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 9))
    vectors = st.lists(st.integers(-2, 2), min_size=width, max_size=width)

    def rows(count: int) -> Tensor:
        return torch.tensor(draw(st.lists(vectors, min_size=count, max_size=count)), dtype=torch.float32)

    def labels(count: int) -> Tensor:
        return torch.tensor(draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))

    mask = st.lists(st.booleans(), min_size=anchors * pool, max_size=anchors * pool)
    keep = draw(st.none() | mask.map(lambda flat: torch.tensor(flat).view(anchors, pool)))
    return rows(anchors), labels(anchors), rows(pool), labels(pool), keep, draw(st.booleans())


@given(cases())
def test_hardest_of_any_case(case: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, bool]) -> None:
    anchors, labels, pool, pool_labels, keep, absolute = case
    found = mine_hardest(anchors, labels, pool, pool_labels, absolute=absolute, keep=keep)
    check_against_loop(found, anchors, labels, pool, pool_labels, absolute=absolute, keep=keep)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([-4.0, -1.0, 1.0, 2.0]), st.integers(0, 2)), min_size=1),
    st.booleans(),
)
def test_ties_go_to_the_lowest_index(pool: list[tuple[int, float, int]], absolute: bool) -> None:
    """Along the axes every cosine is exactly -1, 0 or 1, so ties are exact on any hardware."""
    axes = torch.eye(4)
    embeddings = torch.stack([axes[axis] * scale for axis, scale, _ in pool])
    pool_labels = [label for *_, label in pool]
    found = mine_hardest(axes, torch.zeros(4), embeddings, torch.tensor(pool_labels), absolute=absolute)
    rows = oracle.candidates(0, pool_labels, None)
    for i in range(4):
        expected, _ = oracle.hardest(axes[i].tolist(), embeddings.tolist(), rows, absolute=absolute)
        assert found.indices[i].item() == expected
        assert found.valid[i].item() == bool(rows)


def test_absolute_takes_the_opposite_direction_and_signed_does_not() -> None:
    anchor, pool = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0], [-1.0, 0.1], [0.0, 1.0]])
    labels, pool_labels = torch.tensor([0]), torch.tensor([1, 1, 1])
    assert mine_hardest(anchor, labels, pool, pool_labels, absolute=True).indices.item() == 1
    assert mine_hardest(anchor, labels, pool, pool_labels, absolute=False).indices.item() == 0
    assert mine_hardest(anchor, labels, pool, pool_labels).indices.item() == 1  # the loss's own distance by default


def test_same_class_is_excluded_not_zeroed() -> None:
    """Scores of the anchor's class multiplied by zero, as in the authors' code, would beat these negative cosines."""
    anchor, label = torch.tensor([[1.0, 0.2]], dtype=torch.float64), torch.tensor([3])
    pool = torch.tensor([[-1.0, 0.1], [1.0, 0.2], [-1.0, 0.9], [-0.2, -1.0]], dtype=torch.float64)
    pool_labels = torch.tensor([1, 3, 2, 1])
    cosines = [oracle.cosine(anchor[0].tolist(), row) for row in pool.tolist()]
    assert all(cosine < 0 for cosine, other in zip(cosines, pool_labels.tolist(), strict=True) if other != 3)
    zeroed = [0.0 if other == 3 else cosine for cosine, other in zip(cosines, pool_labels.tolist(), strict=True)]
    assert zeroed.index(max(zeroed)) == 1  # a "negative" of the anchor's own class

    found = mine_hardest(anchor, label, pool, pool_labels, absolute=False)
    assert found.indices.tolist() == [3]
    assert found.valid.tolist() == [True]


@pytest.mark.parametrize("absolute", [False, True])
def test_all_scores_zero_still_avoids_the_anchors_class(absolute: bool) -> None:
    """Orthogonal and zero embeddings: a mask by zero could not tell the classes apart."""
    pool = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 2.0]])
    found = mine_hardest(
        torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 0]), pool, torch.tensor([0, 0, 5]), absolute=absolute
    )
    assert found.indices.tolist() == [2, 2]
    assert found.valid.tolist() == [True, True]


def test_anchor_without_another_class_is_invalid() -> None:
    anchors = torch.randn(3, 4)
    found = mine_hardest(anchors, torch.tensor([7, 1, 7]), torch.randn(5, 4), torch.full((5,), 7))
    assert found.valid.tolist() == [False, True, False]
    assert found.indices[0].item() == found.indices[2].item() == 0


def test_class_of_the_anchor_missing_from_the_pool_leaves_all_entries() -> None:
    anchors, pool = torch.randn(4, 3), torch.randn(6, 3)
    labels, pool_labels = torch.full((4,), 9), torch.tensor([0, 1, 2, 0, 1, 2])
    found = mine_hardest(anchors, labels, pool, pool_labels, absolute=False)
    check_against_loop(found, anchors, labels, pool, pool_labels, absolute=False)


def test_keep_can_leave_an_anchor_with_nothing() -> None:
    keep = torch.tensor([[False, False, False], [True, False, True]])
    pool_labels = torch.tensor([0, 1, 1])
    found = mine_hardest(torch.eye(2), torch.tensor([0, 0]), torch.tensor([[0.0, 1.0]] * 3), pool_labels, keep=keep)
    # The second anchor may use rows 0 and 2, and row 0 is of its own class.
    assert found.indices.tolist() == [0, 2]
    assert found.valid.tolist() == [False, True]


@pytest.mark.parametrize("pairs", [1, 5, 11, 12, 23, 10_000])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_give_the_same_negatives(monkeypatch: pytest.MonkeyPatch, pairs: int, masked: bool) -> None:
    anchors, pool = torch.randn(10, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    labels, pool_labels = torch.randint(3, (10,)), torch.randint(3, (11,))
    labels[4], pool_labels[:] = 8, pool_labels.clamp(max=1)
    keep = torch.rand(10, 11) < 0.4 if masked else None
    monkeypatch.setattr(triplets, "PAIRS_AT_A_TIME", pairs)
    found = mine_hardest(anchors, labels, pool, pool_labels, keep=keep)
    for i, anchor in enumerate(anchors.tolist()):
        rows = oracle.candidates(int(labels[i]), pool_labels.tolist(), None if keep is None else keep[i].tolist())
        expected, best = oracle.hardest(anchor, pool.tolist(), rows, absolute=True)
        assert found.indices[i].item() == expected
        assert found.valid[i].item() == (best > -math.inf)


def test_chunks_hold_no_more_pairs_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    similarity = triplets.cosine_similarity

    def spy(first: Tensor, second: Tensor) -> Tensor:
        seen.append(len(first) * len(second))
        return similarity(first, second)

    monkeypatch.setattr(triplets, "cosine_similarity", spy)
    monkeypatch.setattr(triplets, "PAIRS_AT_A_TIME", 100)
    mine_hardest(torch.randn(35, 3), torch.zeros(35), torch.randn(30, 3), torch.ones(30))
    assert max(seen) <= 100
    assert sum(seen) == 35 * 30


def test_no_anchors_give_no_negatives() -> None:
    found = mine_hardest(torch.randn(0, 3), torch.zeros(0), torch.randn(4, 3), torch.ones(4))
    assert found.indices.shape == found.valid.shape == (0,)


def test_mining_builds_no_graph() -> None:
    anchors = torch.randn(3, 4, requires_grad=True)
    found = mine_hardest(
        anchors, torch.tensor([0, 1, 2]), torch.randn(3, 4, requires_grad=True), torch.tensor([1, 2, 0])
    )
    assert not found.indices.requires_grad
    assert not found.valid.requires_grad
    assert anchors.grad is None


def test_narrow_embeddings_are_mined_in_float32() -> None:
    """In bfloat16 both cosines would round to one; the nearer is the second."""
    anchors = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.bfloat16)
    pool = torch.tensor([[64.0, 1.0, 3.0], [64.0, 1.0, 2.0]], dtype=torch.bfloat16)
    found = mine_hardest(anchors, torch.tensor([0]), pool, torch.tensor([1, 1]))
    assert found.indices.tolist() == [1]
