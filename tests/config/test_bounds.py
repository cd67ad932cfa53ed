"""Radii and step sizes that make no sense, on images of every size."""

import math

import pytest
import torch

from tla_service.config import EvaluationConfig, RunConfig
from tla_service.config.adversary import AttackConfig, EvaluationAttack
from tla_service.config.loading import load_settings
from tla_service.config.radii import known_shape, length_trouble
from tla_service.data import load_dataset
from tla_service.errors import ConfigError
from tla_service.models import Architecture
from tla_service.training.precheck import check_start


@pytest.mark.parametrize(("norm", "largest"), [("linf", 1.0), ("l2", math.sqrt(3 * 32 * 32))])
def test_a_radius_reaches_across_the_cube_at_most(norm: str, largest: float) -> None:
    assert length_trouble("a", norm, largest, shape=(3, 32, 32)) is None  # type: ignore[arg-type]
    found = length_trouble("a", norm, largest * 1.01, shape=(3, 32, 32))  # type: ignore[arg-type]
    assert found is not None
    assert found.subject == "a.epsilon"


@pytest.mark.parametrize("epsilon", [60, 128, 255, 256, 14000, 15000])
def test_the_remedy_of_a_radius_is_accepted(epsilon: float) -> None:
    found = length_trouble("a", "l2", epsilon, shape=(3, 32, 32))
    assert found is not None
    advice = found.remedy.removeprefix("write ").removeprefix("use at most ")
    above, _, below = advice.partition("/")
    value = float(above) / float(below or 1)
    assert length_trouble("a", "l2", value, shape=(3, 32, 32)) is None


@pytest.mark.parametrize("epsilon", [8 / 255, 0.3, 1.0])
def test_steps_from_half_a_percent_of_the_radius_to_twice_it(epsilon: float) -> None:
    for step, steps, ok in [
        (2 * epsilon, 1, True),
        (2.01 * epsilon, 1, False),
        (epsilon / 40, 40, True),
        (epsilon / 4, 1, True),
        (epsilon / 3000, 20, True),
        (epsilon / 5000, 20, False),
    ]:
        assert (length_trouble("a", "linf", epsilon, step, steps) is None) == ok, (step, steps)
    short = length_trouble("a", "linf", epsilon, epsilon / 5000, 20)
    assert short is not None
    advised = float(short.remedy.removeprefix("use about ").partition(",")[0])
    assert length_trouble("a", "linf", epsilon, advised, 20) is None


def test_shapes_known_before_a_data_set_is_read() -> None:
    assert known_shape("cifar10", None) == (3, 32, 32)
    assert known_shape("mnist", 32) == (1, 32, 32)
    assert known_shape("image_folder", 224) is None
    digits = load_settings([]).data
    assert load_dataset(digits).image_shape == known_shape("digits", None)


def test_a_larger_image_size_has_a_longer_diagonal() -> None:
    l2 = ["--attack.norm=l2", "--attack.epsilon=10", "--attack.step_size=3"]
    with pytest.raises(ConfigError, match="longer than the diagonal of 1x8x8"):
        load_settings(l2)
    assert load_settings([*l2, "--data.image_size=16"]).attack.epsilon == 10


def test_fgsm_takes_no_step_of_its_own() -> None:
    load_settings(['--evaluation.test={"fgsm": {"kind": "fgsm", "epsilon": "0.5/255"}}'])


def test_a_set_whose_shape_is_known_only_when_read_is_checked_then() -> None:
    config = RunConfig(attack=AttackConfig(norm="l2", epsilon=9, step_size=1))
    with pytest.raises(ConfigError, match=r"attack\.epsilon=9: longer than the diagonal of 1x8x8 images, 8"):
        check_start(config, load_dataset(config.data), torch.arange(100), 1, Architecture.of(config.model))


def test_what_was_trained_without_these_checks_still_loads() -> None:
    config = RunConfig(evaluation=EvaluationConfig(validation=EvaluationAttack(step_size=2)))
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
