"""What an evaluation runs: norms, radii, and what tells protocols apart."""

from pathlib import Path
from typing import Any

import pytest

from tests.report.measured import plan
from tests.report.subjects import digits, settings
from tla_service.errors import ConfigError
from tla_service.report.plan import (
    Plan,
    detection_name,
    make_plan,
    other_norm_attack,
    protocol,
    radius_name,
)
from tla_service.report.schema import size
from tla_service.report.tables import attack_facts


def test_detection_meets_a_larger_radius_than_training() -> None:
    assert plan().detection.epsilon == pytest.approx(1.5 * 0.15)
    assert detection_name(plan()) == radius_name(0.225)
    assert make_plan(settings(), "mnist", "linf", 0.3, has_surrogate=False).detection.epsilon == 0.3
    assert make_plan(settings(), "cifar10", "linf", 8 / 255, has_surrogate=False).detection.epsilon == 25 / 255


def test_a_detection_radius_that_is_written_alike_has_a_task_of_its_own() -> None:
    near = make_plan(settings(detection={"epsilon": 0.0313725}), "cifar10", "linf", 8 / 255, has_surrogate=False)
    assert radius_name(0.0313725) == radius_name(8 / 255) != detection_name(near)


def test_attacks_are_described_as_they_run() -> None:
    attacks = {"pgd": {"num_steps": 3, "num_restarts": 2}, "fgsm": {"kind": "fgsm"}, "bim": {"kind": "bim"}}
    attacks["bim"]["num_restarts"] = attacks["fgsm"]["num_steps"] = 5
    facts = attack_facts(plan(attacks=attacks))
    assert [(each.num_steps, each.num_restarts) for each in facts.values()] == [(3, 2), (1, 1), (20, 1)]
    assert facts["fgsm"].step_size == 0.15


def test_protocol_names_what_shapes_the_figures_alone() -> None:
    def digest(**changes: Any) -> str:
        chosen = settings(**changes)
        return protocol(make_plan(chosen, "digits", "linf", 0.15, has_surrogate=False))

    plain = digest()
    assert digest(output=Path("elsewhere"), log=False, scaling={"num_workers": 7}, data={"root": "/x"}) == plain
    assert digest(model="models:/tla-digits@champion", norm="linf", epsilon=0.15) == plain
    others = [
        digest(seed=1),
        digest(epsilon=0.1),
        digest(norm="l2"),
        digest(batch_size=10),
        digest(images={"curves": 3}),
        digest(certificate={"sigma": 0.1}),
    ]
    assert len({plain, *others}) == 7


def test_a_norm_without_a_radius_takes_the_documented_one() -> None:
    def made(data: str = "digits", **changes: Any) -> Plan:
        return make_plan(settings(**changes), data, "linf", 0.15, has_surrogate=False)

    l2 = made(norm="l2")
    assert (l2.norm, l2.epsilon) == ("l2", 0.6)
    assert {(attack.norm, attack.epsilon) for attack in l2.columns.values()} == {("l2", 0.6)}
    assert made("cifar10", norm="l2").epsilon == 128 / 255
    assert made("mnist", norm="l2", epsilon=1.5).epsilon == 1.5
    assert made(norm="linf").epsilon == 0.15
    # Twice as far as the threat model of an L2 length above 1, not cut down to 1.
    assert made("mnist", norm="l2").detection.epsilon == pytest.approx(3.0)
    with pytest.raises(ConfigError, match=r"norm=l2: no radius is given.*image_folder; give --epsilon in l2"):
        made("image_folder", norm="l2")


def test_an_attack_in_another_norm_takes_the_documented_radius() -> None:
    attacks = {"pgd20": {"num_steps": 20}, "other": {"norm": "l2", "num_steps": 50}, "near": {"epsilon": 0.01}}
    made = make_plan(settings(attacks=attacks), "digits", "linf", 0.15, has_surrogate=False)
    other, near = made.columns["other"], made.columns["near"]
    assert (other.norm, other.epsilon, other.step_size) == ("l2", 0.6, pytest.approx(0.06))
    assert near.step_size == pytest.approx(0.001)
    # Curves and the audit stay in the threat model, and what AutoAttack is held against too.
    assert (made.iterative, made.within) == ("pgd20", ("pgd20",))
    with pytest.raises(ConfigError, match=r"attacks\.a\.norm=l2: .*give attacks\.a\.epsilon in l2"):
        make_plan(settings(attacks={"a": {"norm": "l2"}}), "parquet", "linf", 0.1, has_surrogate=False)
    with pytest.raises(ConfigError, match=r"none of them is PGD with norm linf and epsilon 0\.15"):
        make_plan(settings(attacks={"a": {"norm": "l2"}}), "digits", "linf", 0.15, has_surrogate=False)


def test_the_papers_columns_are_known_as_such() -> None:
    papers_own: dict[str, object] = {"attacks": {}, "detection": {}, "neighbours": {}}
    papers = make_plan(settings(**papers_own), "cifar10", "linf", 8 / 255, has_surrogate=True)
    assert papers.is_paper
    assert (papers.iterative, papers.restarted, list(papers.transfer)) == ("pgd20", "pgd20x20", ["transfer_pgd7"])
    assert not make_plan(settings(**papers_own), "cifar10", "linf", 4 / 255, has_surrogate=True).is_paper
    assert not make_plan(settings(**papers_own), "cifar10", "l2", 0.5, has_surrogate=True).is_paper
    for other in ({"detection": {"epsilon": 0.05}}, {"neighbours": {"k": 1}}):
        assert not make_plan(settings(**papers_own | other), "cifar10", "linf", 8 / 255, has_surrogate=True).is_paper


def test_the_other_norm_of_an_l2_model_is_l_infinity() -> None:
    l2 = make_plan(settings(), "digits", "l2", 0.6, has_surrogate=False)
    other = other_norm_attack(l2, "digits", digits().image_shape)
    assert (other.norm, other.epsilon) == ("linf", 0.15)
    assert other_norm_attack(plan(), "image_folder", (3, 32, 32)).epsilon == 128 / 255


def test_radii_read_as_people_write_them() -> None:
    found = [size(length) for length in (8 / 255, 0.3, 0.2, 1.5 * 0.4, 128 / 255, 0.3 / 7, 5)]
    assert found == ["8/255", "0.3", "0.2", "0.6", "128/255", "0.0428571", "5"]
