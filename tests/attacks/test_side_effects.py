"""An attack reads the network and leaves no trace in it, nor in the caller's tensors."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tla_service.attacks import Attack, LogitsFn, attack_images, craft

Crafting = Callable[[LogitsFn, Tensor, Tensor, Attack], object]
WAYS: list[Crafting] = [craft, attack_images]
KINDS = ("fgsm", "bim", "pgd", "mim", "cw")


def batchnorm_cnn() -> nn.Sequential:
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
    )
    network(torch.rand(8, 1, 4, 4))  # running statistics that are not their initial values
    return network


def few_steps(kind: str = "pgd") -> Attack:
    return Attack(kind=kind, epsilon=0.1, step_size=0.05, num_steps=3, num_restarts=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_gradients", [False, True])
def test_network_is_left_as_it_was(way: Crafting, kind: str, with_gradients: bool) -> None:
    network = batchnorm_cnn().eval()
    if with_gradients:
        network(torch.rand(8, 1, 4, 4)).square().sum().backward()
        network[5].bias.grad = None  # one among others that has none yet
    before = copy.deepcopy(network)
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in network.named_parameters()}
    way(network, torch.rand(8, 1, 4, 4), torch.randint(3, (8,)), few_steps(kind))

    for (name, value), (_, old) in zip(network.state_dict().items(), before.state_dict().items(), strict=True):
        assert torch.equal(value, old), name
    for name, parameter in network.named_parameters():
        expected = gradients[name]
        assert (parameter.grad is None) == (expected is None), name
        assert expected is None or torch.equal(parameter.grad, expected), name  # type: ignore[arg-type]
        assert parameter.requires_grad
    assert not any(module.training for module in network.modules())


@pytest.mark.parametrize("way", WAYS)
def test_training_flags_are_the_callers(way: Crafting) -> None:
    """Evaluation mode is set outside; a frozen part stays frozen, a training part stays in training."""
    network = batchnorm_cnn()
    network[1].eval()
    flags = [module.training for module in network.modules()]
    way(network, torch.rand(8, 1, 4, 4), torch.randint(3, (8,)), few_steps())
    assert [module.training for module in network.modules()] == flags


@pytest.mark.parametrize("way", WAYS)
def test_frozen_parameters_can_be_attacked(way: Crafting) -> None:
    network = batchnorm_cnn().eval().requires_grad_(False)
    way(network, torch.rand(8, 1, 4, 4), torch.randint(3, (8,)), few_steps())
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_evaluation_mode_makes_an_image_s_attack_its_own() -> None:
    network = batchnorm_cnn().eval().double()
    images, labels = torch.rand(6, 1, 4, 4, dtype=torch.float64), torch.randint(3, (6,))
    attack = Attack(kind="bim", epsilon=0.1, step_size=0.04, num_steps=4)
    together = craft(network, images, labels, attack)
    alone = torch.cat([craft(network, images[i : i + 1], labels[i : i + 1], attack) for i in range(6)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("grad_mode", [False, True])
def test_works_and_leaves_gradient_mode_alone(way: Crafting, grad_mode: bool) -> None:
    network = batchnorm_cnn().eval()
    images, labels = torch.rand(8, 1, 4, 4), torch.randint(3, (8,))
    with torch.set_grad_enabled(grad_mode):
        way(network, images, labels, few_steps())
        assert torch.is_grad_enabled() == grad_mode


@pytest.mark.parametrize("broken_before", [False, True])
def test_images_that_require_gradients_give_results_that_do_not(broken_before: bool) -> None:
    network = batchnorm_cnn().eval()
    images = torch.rand(8, 1, 4, 4).requires_grad_()
    labels = network(images).argmax(1)
    labels = (labels + 1) % 3 if broken_before else labels
    assert not craft(network, images, labels, few_steps()).requires_grad
    attacked = attack_images(network, images, labels, few_steps())
    worst, robust = attacked.images, attacked.robust
    assert not worst.requires_grad
    assert not robust.requires_grad
    assert images.grad is None
    assert images.requires_grad


@pytest.mark.parametrize("way", WAYS)
def test_images_are_not_changed_in_place_nor_aliased(way: Crafting) -> None:
    network = batchnorm_cnn().eval()
    images, labels = torch.rand(8, 1, 4, 4), torch.randint(3, (8,))
    kept_images, kept_labels = images.clone(), labels.clone()
    result = way(network, images, labels, few_steps())
    adversarial = result[0] if isinstance(result, tuple) else result
    assert isinstance(adversarial, Tensor)
    adversarial.fill_(-1)
    assert torch.equal(images, kept_images)
    assert torch.equal(labels, kept_labels)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_generator_decides_every_draw(way: Crafting, norm: str) -> None:
    network = batchnorm_cnn().eval()
    images = torch.rand(8, 1, 4, 4)
    labels = network(images).argmax(1)
    attack = Attack(norm=norm, epsilon=0.1, step_size=0.01, num_steps=2, num_restarts=2)  # type: ignore[arg-type]

    def adversarial(seed: int) -> Tensor:
        result = way(network, images, labels, attack, torch.Generator().manual_seed(seed))  # type: ignore[call-arg]
        return result[0] if isinstance(result, tuple) else result  # type: ignore[return-value]

    state = torch.get_rng_state()
    first = adversarial(1)
    torch.rand(100)
    assert torch.equal(first, adversarial(1))
    assert not torch.equal(first, adversarial(2))
    torch.set_rng_state(state)
    adversarial(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_a_generator_the_global_seed_decides() -> None:
    network = batchnorm_cnn().eval()
    images, labels = torch.rand(8, 1, 4, 4), torch.randint(3, (8,))
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(craft(network, images, labels, few_steps()))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
