import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.triplets import oracle
from tla_service.triplets import angular_distance, cosine_similarity

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
DTYPES = list(TOLERANCE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 2), (7, 5), (17, 64)])
def test_distance_matches_loop(dtype: torch.dtype, rows: int, width: int) -> None:
    first, second = torch.randn(2, rows, width, dtype=dtype)
    found = angular_distance(first, second)
    assert found.dtype == dtype
    assert found.shape == (rows,)
    for row in range(rows):
        expected = oracle.distance(first[row].tolist(), second[row].tolist())
        assert found[row].item() == pytest.approx(expected, abs=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_similarity_of_all_pairs_matches_loop(dtype: torch.dtype) -> None:
    first, second = torch.randn(5, 6, dtype=dtype), torch.randn(9, 6, dtype=dtype)
    found = cosine_similarity(first, second)
    assert found.shape == (5, 9)
    for i in range(5):
        for j in range(9):
            expected = oracle.cosine(first[i].tolist(), second[j].tolist())
            assert found[i, j].item() == pytest.approx(expected, abs=TOLERANCE[dtype])


@given(
    st.integers(1, 6).flatmap(
        lambda width: st.tuples(*[st.lists(st.floats(-1e3, 1e3, width=32), min_size=width, max_size=width)] * 2)
    )
)
def test_distance_of_any_pair(pair: tuple[list[float], list[float]]) -> None:
    first, second = pair
    found = angular_distance(torch.tensor([first], dtype=torch.float64), torch.tensor([second], dtype=torch.float64))
    assert -1e-12 <= found.item() <= 1
    # Shorter than this, an embedding fades into "no direction" on purpose.
    if all(oracle.length(v) == 0 or oracle.length(v) > 1e-3 for v in pair):
        assert found.item() == pytest.approx(oracle.distance(first, second), abs=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([1.0, 0.0], [5.0, 0.0], 0.0),
        ([1.0, 0.0], [-5.0, 0.0], 0.0),
        ([1.0, 0.0], [0.0, 3.0], 1.0),
        ([1.0, 0.0], [1.0, 1.0], 1 - math.sqrt(0.5)),
        ([1.0, 0.0], [-1.0, 1.0], 1 - math.sqrt(0.5)),
        ([3.0, 4.0], [4.0, 3.0], 1 - 24 / 25),
        ([0.0, 0.0], [1.0, 1.0], 1.0),
        ([0.0, 0.0], [0.0, 0.0], 1.0),
    ],
)
def test_distance_by_hand(first: list[float], second: list[float], expected: float) -> None:
    found = angular_distance(torch.tensor([first]), torch.tensor([second]))
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_distance_ignores_length_and_sign() -> None:
    first, second = torch.randn(2, 8, 5, dtype=torch.float64)
    plain = angular_distance(first, second)
    for factor in (1e-4, 3.0, 1e6, -1.0, -20.0):
        torch.testing.assert_close(angular_distance(first * factor, second), plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("both", [False, True])
def test_zero_embedding_has_finite_value_and_gradient(dtype: torch.dtype, both: bool) -> None:
    zero = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
    other = torch.zeros(2, 4, dtype=dtype) if both else torch.randn(2, 4, dtype=dtype)
    other.requires_grad_()
    distance = angular_distance(zero, other)
    assert distance.tolist() == [1.0, 1.0]
    for gradient in torch.autograd.grad(distance.sum(), (zero, other)):
        assert gradient.isfinite().all()
        assert gradient.abs().max() == 0


def test_similarity_with_a_zero_embedding_has_finite_gradient() -> None:
    zero = torch.zeros(1, 3, requires_grad=True)
    similarity = cosine_similarity(zero, torch.randn(4, 3))
    assert similarity.tolist() == [[0.0] * 4]
    (gradient,) = torch.autograd.grad(similarity.sum(), zero)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_embeddings_are_compared_in_float32(narrow: torch.dtype) -> None:
    # 300 squared, 64 times over, overflows float16; the squares of 1e-3 would vanish in it.
    for scale in (300.0, 1e-3):
        first, second = (torch.randn(2, 6, 64) * scale).to(narrow)
        found = angular_distance(first, second)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, angular_distance(first.float(), second.float()))
        for row in range(6):
            expected = oracle.distance(first[row].tolist(), second[row].tolist())
            assert found[row].item() == pytest.approx(expected, abs=2e-6)


def test_gradient_is_right_for_cosines_of_both_signs() -> None:
    first, second = torch.randn(2, 6, 4, dtype=torch.float64)
    cosines = [oracle.cosine(a.tolist(), b.tolist()) for a, b in zip(first, second, strict=True)]
    assert min(cosines) < -0.05
    assert max(cosines) > 0.05
    assert min(map(abs, cosines)) > 1e-3
    assert torch.autograd.gradcheck(angular_distance, (first.requires_grad_(), second.requires_grad_()))


def test_a_step_down_the_gradient_turns_towards_the_nearer_pole() -> None:
    """With a negative cosine, |cos| grows by turning away from `second`, towards its opposite."""

    def turned(second: Tensor) -> float:
        first = torch.tensor([[1.0, 0.0]], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(angular_distance(first, second).sum(), first)
        return (first - 0.1 * gradient)[0, 1].item()

    assert turned(torch.tensor([[1.0, 1.0]], dtype=torch.float64)) > 0.01
    assert turned(torch.tensor([[-1.0, 1.0]], dtype=torch.float64)) < -0.01
