import pytest
import torch
from torch import Tensor

from tests.triplets import oracle
from tla_service.triplets import norm_penalty, triplet_hinge

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6}
DTYPES = list(TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("margin", [0.0, 0.05, 0.6, 1.0])
def test_hinge_matches_loop(dtype: torch.dtype, margin: float) -> None:
    anchors, positives, negatives = torch.randn(3, 40, 7, dtype=dtype)
    found = triplet_hinge(anchors, positives, negatives, margin)
    assert found.shape == (40,)
    assert found.dtype == dtype
    expected = [
        oracle.hinge(a, p, n, margin)
        for a, p, n in zip(anchors.tolist(), positives.tolist(), negatives.tolist(), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, abs=TOLERANCE[dtype])
    if margin < 0.3:
        assert 0 in found.tolist()
        assert max(found.tolist()) > margin


def test_hinge_by_hand() -> None:
    """D(a, p) = 1 - 0.6, D(a, n) = 1 - 0.8, whatever the signs and lengths."""
    anchor, positive, negative = torch.tensor([[1.0, 0.0]]), torch.tensor([[-3.0, 4.0]]), torch.tensor([[8.0, 6.0]])
    assert triplet_hinge(anchor, positive, negative, 0.05).item() == pytest.approx(0.25)
    assert triplet_hinge(anchor, negative, positive, 0.05).item() == 0
    assert triplet_hinge(anchor, negative, positive, 0.3).item() == pytest.approx(0.1)


def test_hinge_is_the_margin_where_positive_and_negative_agree() -> None:
    anchors, others = torch.randn(2, 9, 3, dtype=torch.float64)
    assert triplet_hinge(anchors, others, -2 * others, 0.07).tolist() == pytest.approx([0.07] * 9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hinge_of_zero_embeddings_has_finite_gradient(dtype: torch.dtype) -> None:
    roles = [torch.zeros(2, 3, dtype=dtype, requires_grad=True) for _ in range(3)]
    value = triplet_hinge(roles[0], roles[1], roles[2], 0.05)
    assert value.tolist() == pytest.approx([0.05, 0.05])
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value.sum(), roles))


def test_hinge_gradient_reaches_all_three_roles() -> None:
    roles = torch.randn(3, 8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    anchors, positives, negatives = roles
    value = triplet_hinge(anchors, positives, negatives, 0.1)
    # Away from the kink, some rows on each side of it.
    assert (value - 0.1).abs().min() > 1e-3
    assert (value == 0).any()
    assert (value > 0).any()

    def hinge(a: Tensor, p: Tensor, n: Tensor) -> Tensor:
        return triplet_hinge(a, p, n, 0.1)

    leaves = [role.clone().requires_grad_() for role in roles]
    assert torch.autograd.gradcheck(hinge, leaves)
    active = value > 0
    for gradient in torch.autograd.grad(hinge(*leaves).sum(), leaves):
        assert (gradient[active].abs().amax(1) > 0).all()
        assert (gradient[~active] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("roles", [1, 2, 3])
@pytest.mark.parametrize("form", ["l2_norms", "mean_squares"])
def test_norm_penalty_matches_loop(dtype: torch.dtype, roles: int, form: str) -> None:
    embeddings = tuple(torch.randn(roles, 11, 5, dtype=dtype) * 3)
    found = norm_penalty(embeddings, form)
    assert found.shape == (11,)
    assert found.dtype == dtype
    for row in range(11):
        vectors = [role[row].tolist() for role in embeddings]
        if form == "l2_norms":
            expected = sum(oracle.length(vector) for vector in vectors)
        else:
            expected = sum(sum(x * x for x in vector) / len(vector) for vector in vectors)
        assert found[row].item() == pytest.approx(expected, rel=TOLERANCE[dtype])


def test_norm_penalty_by_hand() -> None:
    roles = (torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[-5.0, 12.0]]))
    assert norm_penalty(roles, "l2_norms").item() == pytest.approx(5 + 0 + 13)
    assert norm_penalty(roles, "mean_squares").item() == pytest.approx((25 + 0 + 169) / 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["l2_norms", "mean_squares"])
def test_norm_penalty_of_a_zero_embedding_has_finite_gradient(dtype: torch.dtype, form: str) -> None:
    zero = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
    value = norm_penalty((zero, torch.ones(2, 4, dtype=dtype)), form)
    (gradient,) = torch.autograd.grad(value.sum(), zero)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("form", ["l2_norms", "mean_squares"])
def test_norm_penalty_gradient(form: str) -> None:
    first, second = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: norm_penalty((a, b), form), (first, second))


def test_narrow_embeddings_are_measured_in_float32() -> None:
    """A square of 300 overflows float16."""
    embeddings = torch.full((1, 4), 300.0, dtype=torch.float16)
    assert norm_penalty((embeddings,), "l2_norms").item() == pytest.approx(600)
    assert norm_penalty((embeddings,), "mean_squares").item() == pytest.approx(90_000)
    assert norm_penalty((embeddings,), "l2_norms").dtype == torch.float32
