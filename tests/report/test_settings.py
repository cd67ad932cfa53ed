"""What the evaluation job can be told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.report.subjects import settings
from tla_service.config import DataConfig
from tla_service.config.loading import read_settings
from tla_service.errors import ConfigError
from tla_service.report.plan import check_plan, make_plan
from tla_service.report.settings import EvaluateSettings, spread_lists


def read(*arguments: str) -> EvaluateSettings:
    return read_settings(EvaluateSettings, spread_lists(arguments))


def test_compare_takes_several_models() -> None:
    found = read("--model", "a", "--compare", "b", "c", "--compare", "d", "--epsilon", "8/255")
    assert found.compare == ("b", "c", "d")
    assert found.epsilon == pytest.approx(8 / 255)


@given(st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=4), max_size=4))
def test_spreading_keeps_what_is_no_list(words: list[str]) -> None:
    assert spread_lists(["--model", *words]) == ["--model", *words]


@pytest.mark.parametrize(
    ("arguments", "field", "remedy"),
    [
        ([], "model", "--model"),
        (["--model", "a", "--epsilon", "0"], "epsilon", "radius"),
        (["--model", "a", "--epsilon", "8"], "epsilon", "8/255, or give --norm l2"),
        (["--model", "a", "--detection.epsilon", "25"], "detection.epsilon", "25/255"),
        (["--model", "a", "--detection.epsilon", "0.1", "--detection.step_size", "1"], "detection.step_size", "1/255"),
        (["--model", "a", "--attacks", '{"x": {"norm": "linf", "epsilon": 8}}'], "attacks.x.epsilon", "8/255"),
        (["--model", "a", "--attacks", '{"x": {"epsilon": 0.1, "step_size": 2}}'], "attacks.x.step_size", "2/255"),
        (["--model", "a", "--attacks", '{"x": {"kind": "deepfool"}}'], "attacks.x.kind", "fgsm"),
        (["--model", "a", "--attacks", '{"worst": {}}'], "attacks.worst", "rename"),
        (["--model", "a", "--attacks", '{"last": {}}'], "attacks.last", "rename"),
        (["--model", "a", "--images.autoatack", "5"], "images.autoatack", "images.autoattack"),
        (["--model", "a", "--batch_size", "1"], "batch_size", "batch_size"),
        (["--model", "a", "--compare"], "--compare", "expected one argument"),
        (["--model", "a", "--compare", "b", "c", "--compare", "--no-page"], "--compare", "expected one argument"),
    ],
)
def test_refuses(arguments: list[str], field: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(*arguments)
    assert field in str(refused.value)
    assert remedy in str(refused.value)


def test_data_are_those_of_training_unless_given() -> None:
    trained = DataConfig(name="mnist", root="/there", train_limit=500, test_limit=10)
    chosen = settings(data={"root": "/here"}).data_config(trained)
    assert (chosen.name, chosen.root, chosen.train_limit, chosen.test_limit) == ("mnist", "/here", 500, None)
    assert settings(data={"name": "digits"}).data_config(trained).root is None
    with pytest.raises(ConfigError, match=r"data\.name"):
        settings().data_config(None)


def test_splits_of_another_copy_of_the_data_have_other_names() -> None:
    trained = DataConfig(name="image_folder", root="/there", image_size=32, train=".", test_fraction=0.2)
    same = settings(data={"root": "/here"}).data_config(trained)
    assert (same.train, same.test_fraction, same.image_size) == (".", 0.2, 32)
    other = settings(data={"root": "/here", "train": "train", "test": "exam", "validation": ""}).data_config(trained)
    assert (other.train, other.test, other.validation, other.test_fraction) == ("train", "exam", "", None)
    given = {"name": "parquet", "root": "/p", "image_size": 48}
    assert settings(data=given).data_config(trained).image_size == 48


def test_a_variable_of_the_training_job_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLA_LOSS__MARGIN", "0.1")
    assert read("--model", "a").model == "a"
    monkeypatch.setenv("TLA_LOS__MARGIN", "0.1")
    with pytest.raises(ConfigError, match="TLA_LOS__MARGIN"):
        read("--model", "a")


def test_lengths_are_checked_again_once_model_and_images_are_known() -> None:
    shape = (1, 8, 8)
    plan = make_plan(settings(norm="l2", epsilon=7.0), "digits", "linf", 0.15, has_surrogate=False)
    check_plan(plan, shape, 10)
    plan = make_plan(settings(norm="l2", epsilon=9.0), "digits", "linf", 0.15, has_surrogate=False)
    with pytest.raises(ConfigError, match=r"^epsilon=9: longer than the diagonal of 1x8x8 images, 8; write 9/255"):
        check_plan(plan, shape, 10)
    attacks = {"pgd": {}, "far": {"step_size": 0.5}}
    plan = make_plan(settings(attacks=attacks), "digits", "linf", 0.15, has_surrogate=False)
    with pytest.raises(ConfigError, match=r"^attacks\.far\.step_size=0\.5: over twice attacks\.far\.epsilon=0\.15"):
        check_plan(plan, shape, 10)
    plan = make_plan(settings(detection={"step_size": 1.0}), "digits", "linf", 0.15, has_surrogate=False)
    with pytest.raises(ConfigError, match=r"^detection\.step_size=1: over twice"):
        check_plan(plan, shape, 10)


@pytest.mark.parametrize(
    ("pictures", "said"),
    [
        ({"tsne_class": 10}, r"^pictures\.tsne_class=10: there are classes 0 to 9; choose among them"),
        ({"tsne_class": -1}, r"^pictures\.tsne_class=-1: there"),
        ({"tsne_pair": (9, 10)}, r"^pictures\.tsne_pair=\(9, 10\): there"),
    ],
)
def test_pictures_of_classes_that_are_not_there_are_refused_before_anything_is_measured(
    pictures: dict[str, object], said: str
) -> None:
    plan = make_plan(settings(pictures=pictures), "digits", "linf", 0.15, has_surrogate=False)
    with pytest.raises(ConfigError, match=said):
        check_plan(plan, (1, 8, 8), 10)
