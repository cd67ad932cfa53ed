"""The fast ways to attack against the plain one, and what a step must not do: compute weight gradients, or wait."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.training.conftest import digits_config, loss_of, random_batch
from tla_service.config import RunConfig
from tla_service.models import build_model
from tla_service.runtime import WorkerContext, generator
from tla_service.training.adversary import Adversary
from tla_service.training.step import TrainingStep

CPU = torch.device("cpu")


def batchnorm_network(dtype: torch.dtype = torch.float64) -> nn.Module:
    """With statistics of its own, in train mode."""
    torch.manual_seed(0)
    network = build_model("mnist_cnn", 4, (1, 8, 8)).to(dtype).train()
    for _ in range(3):
        network(torch.rand(16, 1, 8, 8, dtype=dtype))
    return network


def crafted(config: RunConfig, network: nn.Module, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return Adversary(network, config, WorkerContext()).craft(random_batch(8, dtype=dtype).anchors, generator(CPU, 1))


def test_folding_changes_no_attacked_image() -> None:
    network = batchnorm_network()
    plain = crafted(digits_config(speed={"fold_batchnorm": False}), network)
    folded = crafted(digits_config(), network)
    torch.testing.assert_close(folded, plain, rtol=0, atol=1e-12)
    assert not torch.equal(plain, random_batch(8).anchors.images)


def test_the_attack_follows_updates() -> None:
    network = batchnorm_network()
    crafter = Adversary(network, digits_config(), WorkerContext())
    crafter.craft(random_batch(8).anchors, generator(CPU, 1))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    found = crafter.craft(random_batch(8).anchors, generator(CPU, 1))
    assert torch.equal(found, crafted(digits_config(), network))


class WeightGradients(TorchDispatchMode):
    """Counts convolution gradients: to the input, and to weights."""

    def __init__(self) -> None:
        super().__init__()
        self.to_input = self.to_weights = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            mask = args[10]
            self.to_input += mask[0]
            self.to_weights += mask[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fold", [False, True])
def test_an_attack_computes_no_weight_gradient(monkeypatch: pytest.MonkeyPatch, compiled: bool, fold: bool) -> None:
    """Compiled code computes them even under `autograd.grad`, unless the weights ask for none when it is traced."""
    original = torch.compile
    # What Inductor would be given, run operation by operation.
    monkeypatch.setattr(torch, "compile", lambda module: original(module, backend="aot_eager"))
    network = batchnorm_network()
    expected = crafted(digits_config(speed={"fold_batchnorm": False}), network)
    speed = {"compile": "attack" if compiled else "none", "fold_batchnorm": fold}
    config = digits_config(speed=speed)
    crafter = Adversary(network, config, WorkerContext())
    crafter.craft(random_batch(8).anchors, generator(CPU, 1))
    with WeightGradients() as counts:
        found = crafter.craft(random_batch(8).anchors, generator(CPU, 1))
    assert counts.to_input == 4 * config.attack.num_steps
    assert counts.to_weights == 0
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert all(parameter.grad is None for parameter in network.parameters())
    torch.compiler.reset()


def test_the_counter_sees_weight_gradients() -> None:
    """What makes the test above able to fail."""
    network = batchnorm_network()
    with WeightGradients() as counts:
        network(torch.rand(4, 1, 8, 8, dtype=torch.float64)).logits.sum().backward()
    assert counts.to_weights == 4


def test_the_last_steps_embeddings_are_those_the_attack_has_seen() -> None:
    network = batchnorm_network()
    one, two = (digits_config(attack={"num_steps": steps, "random_start": False}) for steps in (1, 2))
    crafter = Adversary(network, two, WorkerContext())
    crafter.craft(random_batch(8).anchors, generator(CPU, 1))
    after_one = crafted(one, network)
    assert crafter.last_embeddings is not None
    torch.testing.assert_close(crafter.last_embeddings, network.eval()(after_one).embeddings, rtol=1e-9, atol=1e-9)
    assert not crafter.last_embeddings.requires_grad


def test_mining_with_them_saves_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {}
    for queries in ("final", "last_step"):
        seen: list[int] = []
        original = Adversary.embed

        def embed(self: Adversary, *images: torch.Tensor, seen: list[int] = seen, original: Any = original) -> Any:
            seen.extend(map(len, images))
            return original(self, *images)

        with monkeypatch.context() as patched:
            patched.setattr(Adversary, "embed", embed)
            config = digits_config(mining={"pool": "separate", "pool_size": 12, "queries": queries})
            step = TrainingStep(batchnorm_network(), config, WorkerContext())
            loss_of(step, random_batch(8, pool=12))
        counts[queries] = seen
    assert counts == {"final": [8, 12], "last_step": [12]}


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, 2),  # the attacked images and the pool
        ({"attack": {"awp": True}}, 2),  # the second pass takes the first one's negatives
        ({"method": "tla_rn"}, 0),  # drawn, not mined
        ({"method": "tla_rn", "attack": {"awp": True}}, 0),
        ({"method": "tla_rn", "mining": {"queries": "last_step"}}, 0),
        ({"attack": {"awp": True}, "mining": {"scope": "global", "keep_probability": 0.5}}, 2),
    ],
    ids=str,
)
def test_images_are_embedded_for_mining_only_where_it_mines(changes: dict[str, Any], passes: int) -> None:
    mining = {"pool": "separate", "pool_size": 12} | changes.get("mining", {})
    step = TrainingStep(batchnorm_network(), digits_config(**changes | {"mining": mining}), WorkerContext())
    forward = step.adversary._twin.module.forward
    seen: list[torch.Tensor] = []

    def count(images: torch.Tensor) -> Any:
        seen.append(images)
        return forward(images)

    step.adversary._twin.module.forward = count  # type: ignore[method-assign]
    step.backward(random_batch(8, pool=12), 0)
    assert len(seen) == step.config.attack.num_steps + passes


WAITS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy", "nonzero")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of calls that would make the host wait for the device, as they happen."""
    seen: list[str] = []
    for name in WAITS:
        original = getattr(torch.Tensor, name)

        def spy(self: torch.Tensor, *arguments: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            seen.append(name)
            return original(self, *arguments, **options)

        monkeypatch.setattr(torch.Tensor, name, spy)
    return seen


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "natural"},
        {"method": "at"},
        {"method": "alp"},
        {},
        {"method": "tla_rn"},
        {"mining": {"positives": "both", "scope": "global"}},
        {"mining": {"pool": "separate", "pool_size": 12, "positives": "both", "clean_noise": 0.1}},
        {"training": {"batchnorm_roles": "apart"}, "attack": {"batchnorm": "train"}},
        {"attack": {"norm": "l2"}},
    ],
    ids=str,
)
def test_nothing_waits_for_the_device_inside_a_step(no_waiting: list[str], changes: dict[str, Any]) -> None:
    network = batchnorm_network(torch.float32)
    config = digits_config(**changes)
    step = TrainingStep(network, config, WorkerContext())
    no_waiting.clear()  # drawing initial weights waits
    step.backward(random_batch(8, pool=12, dtype=torch.float32), 0)
    assert no_waiting == []
    float(next(iter(network.parameters())).detach().sum())
    assert no_waiting  # the fixture sees what it is there to see


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_on_a_gpu_does_not_synchronize(graphs: bool) -> None:
    device = torch.device("cuda")
    network = batchnorm_network(torch.float32).to(device)
    config = digits_config(speed={"cuda_graphs": graphs})
    step = TrainingStep(network, config, WorkerContext(device=device))
    batch = random_batch(dtype=torch.float32)
    on_device = type(batch)(
        type(batch.anchors)(batch.anchors.images.to(device), batch.anchors.labels.to(device)),
        None,
        None,
        len(batch.anchors.labels),
    )
    step.backward(on_device, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype feature, as torch warns once
        torch.cuda.set_sync_debug_mode("error")
    try:
        step.backward(on_device, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
