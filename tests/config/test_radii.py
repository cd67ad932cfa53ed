"""A radius counts in its own norm: another norm takes the documented radius of the data set, or is refused."""

from pathlib import Path
from typing import Any

import pytest

from tests.config.refusal import file_of, refusal
from tla_service.config import RunConfig
from tla_service.config.adversary import AttackConfig, EvaluationAttack
from tla_service.config.loading import load_settings, read_settings, to_yaml
from tla_service.config.radii import RADII, customary_radius, documented_radius
from tla_service.errors import ConfigError
from tla_service.registry.job_settings import ImportSettings
from tla_service.tuning.settings import SweepConfig
from tla_service.tuning.space import Space

L2 = ["--attack.norm=l2", "--attack.epsilon=0.6", "--attack.step_size=0.15"]


def lengths(arguments: list[str]) -> dict[str, tuple[str, float | None, float | None]]:
    """Norm, radius and step size of each attack of the evaluation."""
    settings = load_settings(arguments)
    return {
        where.removeprefix("evaluation."): tuple(attack.lengths(settings.attack, settings.data.name))
        for where, attack in settings.evaluation.attacks.items()
    }


def test_documented_radii_are_lengths_of_their_norm() -> None:
    assert documented_radius("cifar10", "linf") == 8 / 255
    assert documented_radius("cifar10", "l2") == 128 / 255
    assert documented_radius("mnist", "l2") == 2
    assert documented_radius("image_folder", "l2") is None
    for (name, norm), (epsilon, source) in RADII.items():
        assert source
        # An L2 radius is that of a perturbation over many pixels, never an L-infinity radius read again.
        assert norm == "linf" or epsilon > 3 * RADII[name, "linf"][0]


def test_customary_radii_follow_the_literature_or_scale_with_the_image() -> None:
    assert customary_radius("mnist", "l0", (1, 28, 28)) == (12, "Schott et al. 2019")
    assert customary_radius("cifar10", "l2", (3, 32, 32))[0] == 128 / 255
    # Without a radius of their own: MNIST's or CIFAR-10's, by the number of values.
    assert customary_radius("cifar100", "l1", (3, 32, 32)) == (12, "as CIFAR-10's")
    assert customary_radius("image_folder", "linf", (3, 64, 64)) == (8 / 255, "as CIFAR-10's")
    assert customary_radius("image_folder", "l2", (3, 64, 64)) == (256 / 255, "CIFAR-10's, scaled to the image size")
    assert customary_radius("image_folder", "l1", (3, 64, 64))[0] == 48
    assert customary_radius("parquet", "l0", (1, 14, 14)) == (3, "MNIST's, scaled to the image size")
    assert customary_radius("digits", "l0", (1, 8, 8))[0] == 1
    # The rule gives nearly the radius that is documented for digits.
    assert customary_radius("parquet", "l2", (1, 8, 8))[0] == pytest.approx(0.6, rel=0.05)


@pytest.mark.parametrize(
    ("attack", "expected"),
    [
        ({}, ("linf", 8 / 255, 2 / 255)),
        ({"epsilon": 4 / 255}, ("linf", 4 / 255, pytest.approx(1 / 255))),
        ({"step_size": 1 / 255}, ("linf", 8 / 255, 1 / 255)),
        ({"norm": "linf"}, ("linf", 8 / 255, 2 / 255)),
        ({"norm": "l2"}, ("l2", 128 / 255, pytest.approx(32 / 255))),
        ({"norm": "l2", "step_size": 0.1}, ("l2", 128 / 255, 0.1)),
        ({"norm": "l2", "epsilon": 1.0}, ("l2", 1.0, pytest.approx(0.25))),
    ],
)
def test_what_an_attack_of_the_evaluation_leaves_open(attack: dict[str, Any], expected: Any) -> None:
    assert EvaluationAttack.model_validate(attack).lengths(AttackConfig(), "cifar10") == expected


def test_a_norm_of_the_evaluation_takes_the_documented_radius() -> None:
    found = lengths(
        ["--preset=digits", "--evaluation.validation.norm=l2", '--evaluation.test={"pgd50x3": {"norm": "l2"}}']
    )
    assert found["validation"] == ("l2", 0.6, pytest.approx(0.15))
    # Not the preset's step of 0.015, which is one in L-infinity.
    assert found["test.pgd50x3"] == ("l2", 0.6, pytest.approx(0.15))
    assert found["test.fgsm"] == ("linf", 0.15, 0.0375)


def test_a_step_of_a_preset_does_not_become_a_step_in_another_norm() -> None:
    found = lengths(["--preset=cifar10", "--data.root=/data", "--evaluation.validation.norm=l2"])
    assert found["validation"] == ("l2", 128 / 255, pytest.approx(32 / 255))


def test_the_norm_of_training_brings_its_lengths_to_the_evaluation() -> None:
    found = lengths(["--preset=digits", *L2])
    assert set(found.values()) == {("l2", 0.6, 0.15)}
    assert lengths(["--preset=digits", *L2, "--evaluation.validation.norm=linf"])["validation"][:2] == ("linf", 0.15)


def test_lengths_named_with_their_norm_stay(tmp_path: Path) -> None:
    text = "preset: digits\nevaluation: {validation: {norm: l2, epsilon: 0.3, step_size: 0.05}}"
    assert lengths(file_of(tmp_path, text))["validation"] == ("l2", 0.3, 0.05)
    assert lengths([*file_of(tmp_path, text), *L2])["validation"] == ("l2", 0.3, 0.05)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--attack.norm=l2"], "no default in this norm"),
        (["--attack.norm=l2", "--attack.epsilon=0.6"], "no default in this norm"),
        (["--attack.norm=l2", "--attack.step_size=0.15"], "no default in this norm"),
        (["--preset=digits", "--attack.norm=l2"], "documented radius of digits is 0.6"),
        (["--preset=cifar10", "--data.root=/x", "--attack.norm=l2", "--attack.epsilon=1"], "of cifar10 is 0.502"),
    ],
)
def test_a_training_norm_without_its_lengths_is_refused(arguments: list[str], said: str) -> None:
    error = refusal(arguments)
    assert (error.subject, error.value) == ("attack.norm", "l2")
    assert "give attack.epsilon and attack.step_size" in error.remedy
    assert said in str(error)


def test_a_norm_above_a_file_is_refused_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = to_yaml(load_settings(["--preset=digits", *L2]).run_config)
    error = refusal([*file_of(tmp_path, finished), "--attack.norm=linf"])
    assert "are given in l2" in error.reason
    monkeypatch.setenv("TLA_ATTACK__NORM", "l2")
    assert refusal(["--preset=digits"]).subject == "attack.norm"
    assert load_settings(file_of(tmp_path, finished)).attack.epsilon == 0.6


@pytest.mark.parametrize("where", ["evaluation.validation", "evaluation.test.a"])
def test_a_norm_without_a_documented_radius_is_refused(tmp_path: Path, where: str) -> None:
    attack = "validation: {norm: l2}" if where.endswith("validation") else "test: {a: {norm: l2}}"
    data = "data: {name: image_folder, root: /x, image_size: 32}"
    error = refusal(file_of(tmp_path, f"{data}\nevaluation: {{{attack}}}"))
    assert error.subject == f"{where}.norm"
    assert "none is documented for image_folder" in error.reason
    assert f"give {where}.epsilon" in error.remedy
    given = attack.replace("l2", "l2, epsilon: 0.5")
    assert load_settings(file_of(tmp_path, f"{data}\nevaluation: {{{given}}}"))


def test_runs_of_before_still_load() -> None:
    """What was trained without these checks is read as it was."""
    written = RunConfig.model_validate(
        {"data": {"name": "image_folder", "root": "/x"}, "evaluation": {"test": {"a": {"norm": "l2"}}}}
    ).model_dump(mode="json")
    assert RunConfig.model_validate(written).evaluation.test["a"].norm == "l2"


def test_trials_of_a_sweep_are_measured_at_documented_radii() -> None:
    run = load_settings(["--preset=digits", "--evaluation.validation.norm=l2"]).run_config
    sweep = SweepConfig.model_validate({"space": {"attack.epsilon": {"values": [0.1, 0.2]}}})
    trial = Space(run, sweep).apply({"attack.epsilon": 0.1})
    assert trial.evaluation.validation.epsilon == 0.6
    assert trial.evaluation.test["fgsm"].epsilon == 0.15


def test_a_sweep_over_norms_brings_their_lengths() -> None:
    run = load_settings(["--preset=digits"]).run_config
    alone = SweepConfig.model_validate({"space": {"attack.norm": {"values": ["linf", "l2"]}}})
    with pytest.raises(ConfigError, match=r"sweep.space.attack.norm=l2: .*are in linf; use variants"):
        Space(run, alone)
    l2 = {"attack.norm": "l2", "attack.epsilon": 0.6, "attack.step_size": 0.15}
    both = SweepConfig.model_validate({"space": {"threat": {"variants": {"linf": {"attack.norm": "linf"}, "l2": l2}}}})
    assert Space(run, both).apply({"threat": "l2"}).attack.epsilon == 0.6


def test_imported_weights_take_the_documented_radius() -> None:
    def read(*arguments: str) -> ImportSettings:
        return read_settings(ImportSettings, ["--file=w.pt", *arguments])

    assert read("--data.name=cifar10", "--data.root=/x").radius == 8 / 255
    assert read("--data.name=cifar10", "--data.root=/x", "--norm=l2").radius == 128 / 255
    assert read("--data.name=cifar10", "--data.root=/x", "--norm=l2", "--epsilon=1").radius == 1
    with pytest.raises(ConfigError, match=r"norm=l2: .*give --epsilon in l2"):
        read("--data.name=parquet", "--data.root=/x", "--norm=l2")
