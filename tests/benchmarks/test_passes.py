"""The arithmetic behind the bars, counted: rows that go forward and backward through the networks of a step."""

from typing import Any

import pytest
from torch import Tensor, nn

from benchmarks.stages import LITERAL, literal
from benchmarks.workloads import Changes, FullStep
from tests.benchmarks.test_stages import TINY
from tla_service.runtime import WorkerContext

ATTACK = 14  # seven steps forward and back to the images


class Rows:
    """Rows through the first convolution of a network, and gradients of rows that come back to it.

    Args:
        network: The network.
    """

    def __init__(self, network: nn.Module) -> None:
        self.forward = self.backward = 0
        first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
        first.register_forward_hook(self._seen)

    def _seen(self, _module: nn.Module, _given: Any, output: Tensor) -> None:
        self.forward += len(output)
        if output.requires_grad:
            output.register_hook(self._returned)

    def _returned(self, gradient: Tensor) -> None:
        self.backward += len(gradient)


@pytest.mark.parametrize(
    ("changes", "attacked", "looked_at", "trained"),
    [
        ({"method": "at"}, 7, 0, 1),
        ({}, 7, 0, 2),
        (literal(TINY, LITERAL["TLA, literal"]), 7, 2, 3),
        (literal(TINY, LITERAL["TLA, literal, two positives"]), 7, 2, 4),
    ],
    ids=["AT", "TLA, pool: batch", "literal", "literal, two positives"],
)
def test_a_step_makes_the_passes_that_its_bar_counts(
    changes: Changes, attacked: int, looked_at: int, trained: int
) -> None:
    step = FullStep(TINY, WorkerContext(), attack={"num_steps": 7}, **changes)
    network, twin = Rows(step.network), Rows(step.adversary._twin.module)
    step()
    batch = TINY.batch_size
    assert (twin.forward, twin.backward) == ((attacked + looked_at) * batch, attacked * batch)
    assert (network.forward, network.backward) == (trained * batch, trained * batch)


def units(changes: Changes, num_steps: int) -> int:
    """A step's work in units of the batch: one forward, one back to the input, one back to the weights."""
    step = FullStep(TINY, WorkerContext(), attack={"num_steps": num_steps}, **changes)
    network, twin = Rows(step.network), Rows(step.adversary._twin.module)
    step()
    # No weight of the twin asks for a gradient; all of the network's do.
    assert not any(parameter.requires_grad for parameter in step.adversary._twin.module.parameters())
    assert all(parameter.grad is not None for parameter in step.network.parameters())
    return (twin.forward + twin.backward + network.forward + 2 * network.backward) // TINY.batch_size


@pytest.mark.parametrize(("num_steps", "bar", "above"), [(7, 1.50, 28 / 17), (40, 1.12, 94 / 83)])
def test_one_positive_fits_the_bar_and_two_do_not(num_steps: int, bar: float, above: float) -> None:
    at = units({"method": "at"}, num_steps)
    one, two = (units(literal(TINY, positives), num_steps) / at for positives in LITERAL.values())
    assert at == 2 * num_steps + 3
    assert one == (2 * num_steps + 11) / at <= bar < two == above
