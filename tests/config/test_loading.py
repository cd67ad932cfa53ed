"""Where settings come from, and which source wins."""

import os
import re
from importlib import resources
from itertools import combinations
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tla_service.cluster.doctor.settings import CheckupSettings
from tla_service.config import EvaluationConfig, RunConfig, TrackingConfig, loading
from tla_service.config.adversary import EvaluationAttack
from tla_service.config.loading import (
    RunSettings,
    find_output,
    load_config_file,
    load_settings,
    print_config,
    to_yaml,
)
from tla_service.errors import ConfigError
from tla_service.tuning.settings import SweepConfig, sweep_yaml


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str, name: str = "run.yaml") -> list[str]:
    """A file, as the arguments that read it."""
    (folder / name).write_text(text)
    return ["--config", str(folder / name)]


def test_relative_paths_of_data_are_those_of_the_driver(folder: Path) -> None:
    """Ray's workers and trials have working directories of their own."""
    flags = ["--data.name=mnist", "--data.root=mnist", "--data.cache_dir=~/cache", "--data.extra.path=s3://b/extra"]
    data = load_settings([*flags, "--data.extra.share=0.5"]).run_config.data
    assert (data.root, data.cache_dir, data.extra.path) == (str(folder / "mnist"), "~/cache", "s3://b/extra")


# -------------------------------------------------------------------------------------------- precedence

DIGITS = yaml.safe_load((resources.files("tla_service.config") / "presets" / "digits.yaml").read_text())
DEFAULT, PRESET, FILE, ENVIRONMENT, FLAG = 8 / 255, DIGITS["attack"]["epsilon"], 0.21, 0.25, 0.3


SOURCES = ("preset", "file", "environment", "flag")


@pytest.mark.parametrize("sources", [chosen for count in range(5) for chosen in combinations(SOURCES, count)])
def test_precedence(folder: Path, monkeypatch: pytest.MonkeyPatch, sources: tuple[str, ...]) -> None:
    """Defaults < preset < file < environment < command line, in every combination, on one field."""
    arguments: list[str] = []
    expected = DEFAULT
    if "preset" in sources:
        arguments, expected = [*arguments, "--preset", "digits"], PRESET
    if "file" in sources:
        arguments, expected = [*arguments, *write(folder, f"attack: {{epsilon: {FILE}}}")], FILE
    if "environment" in sources:
        monkeypatch.setenv("TLA_ATTACK__EPSILON", str(ENVIRONMENT))
        expected = ENVIRONMENT
    if "flag" in sources:
        arguments, expected = [*arguments, "--attack.epsilon", str(FLAG)], FLAG
    found = load_settings(arguments)
    assert found.attack.epsilon == expected
    assert found.run_config.attack.epsilon == expected
    # The rest of the section still comes from the sources below.
    assert found.attack.step_size == (DIGITS["attack"]["step_size"] if "preset" in sources else 2 / 255)
    assert found.training.epochs == (DIGITS["training"]["epochs"] if "preset" in sources else 10)


def test_sources_fill_one_section_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLA_LOSS__NORM_WEIGHT", "0.25")
    file = write(folder, "loss: {margin: 0.5, triplet_weight: 3}\npreset: digits\noutput: there")
    found = load_settings([*file, "--loss.margin=0.75"])
    assert (found.loss.margin, found.loss.norm_weight, found.loss.triplet_weight) == (0.75, 0.25, 3)
    assert found.optimizer.name == "adam"  # of the preset that the file names
    assert find_output(found)[1] == folder / "there"


def test_preset_and_file_can_be_named_in_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLA_PRESET", "digits")
    monkeypatch.setenv("TLA_CONFIG", write(folder, "seed: 11")[1])
    found = load_settings([])
    assert (found.attack.epsilon, found.seed) == (PRESET, 11)


@pytest.mark.parametrize("where", ["flag", "flag=", "file", "environment"])
def test_the_old_name_of_pretrained_weights_is_read_with_a_hint(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    loading._hint_renamed.cache_clear()
    arguments = {"flag": ["--model.weights", "w"], "flag=": ["--model.weights=w"]}.get(where, [])
    if where == "file":
        arguments = write(folder, "model: {weights: w, name: small_cnn}")
    if where == "environment":
        monkeypatch.setenv("TLA_MODEL__WEIGHTS", "w")
    assert load_settings(arguments).model.pretrained == "w"
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        "model.weights is now called model.pretrained"
    ]


def test_the_old_and_the_new_name_of_pretrained_weights(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    loading._hint_renamed.cache_clear()
    assert load_settings([*write(folder, "model: {weights: null}"), "--model.pretrained=w"]).model.pretrained == "w"
    assert caplog.records == []  # as in the config.yaml of every earlier run
    with pytest.raises(ConfigError, match=r"model\.weights=a: model\.pretrained, its new name, is set too"):
        load_settings([*write(folder, "model: {weights: a}"), "--model.pretrained=b"])


@pytest.mark.parametrize("word", ["none", "None", "null"])
def test_the_word_none_is_no_name(folder: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.setenv("TLA_SCALING__STORAGE", word)
    file = write(folder, f"data: {{train: {word}, augment: none}}")
    found = load_settings([*file, "--tracking.registered_model", word, "--training.max_steps", word])
    assert found.run_config.digest == RunConfig().digest
    assert found.run_config == RunConfig()


def test_attacks_of_a_file_replace_the_defaults(folder: Path) -> None:
    found = load_settings(write(folder, "evaluation: {test: {mine: {kind: cw}}}"))
    assert set(found.evaluation.test) == {"mine"}


def test_written_configuration_is_read_back_equal(folder: Path) -> None:
    config = RunConfig(
        seed=5,
        evaluation=EvaluationConfig(test={"mine": EvaluationAttack(kind="mim", norm="l2", epsilon=1.5, num_steps=3)}),
        tracking=TrackingConfig(tags={"a": "b"}),
    )
    arguments = write(folder, to_yaml(config))
    assert load_config_file(folder / "run.yaml") == config
    assert load_settings(arguments).run_config == config


def test_nothing_given_is_the_default() -> None:
    found = load_settings([])
    assert found.run_config == RunConfig()
    assert type(found.run_config) is RunConfig
    assert find_output(found)[1] == Path.cwd() / "runs" / RunConfig().run_name


def test_output_folder_expands_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert find_output(load_settings(["--output", "~/x"]))[1] == Path("/somewhere/x")
    assert find_output(load_settings(["--name", "mine"]))[1] == Path.cwd() / "runs" / "mine"


def test_empty_file_changes_nothing(folder: Path) -> None:
    for text in ("", "# only a comment\n", "---\n", "~"):
        assert load_settings(write(folder, text)).run_config == RunConfig()


def test_settings_are_frozen() -> None:
    found = load_settings([])
    with pytest.raises(Exception, match="frozen"):
        found.seed = 3  # type: ignore[misc]


# --------------------------------------------------------------------------------------------- fractions


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8/255", 8 / 255),
        ("  8 / 255 ", 8 / 255),
        ("1/1", 1.0),
        ("0.125", 0.125),
        ("1e-2", 0.01),
        ("016/0510", 8 / 255),
    ],
)
@pytest.mark.parametrize("source", ["flag", "environment", "file", "file, quoted"])
def test_fraction(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, text: str, expected: float) -> None:
    arguments: list[str] = []
    if source == "flag":
        arguments = [f"--attack.epsilon={text}"]
    elif source == "environment":
        monkeypatch.setenv("TLA_ATTACK__EPSILON", text)
    else:
        written = f"'{text}'" if "quoted" in source else text
        arguments = write(folder, f"attack: {{epsilon: {written}}}")
    assert load_settings([*arguments, "--attack.step_size=1/1000"]).attack.epsilon == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    "text",
    [
        "8/0",
        "a/b",
        "8/",
        "/255",
        "/",
        "1/2/3",
        "1 2/255",
        "nan/1",
        "inf/2",
        "9" * 400 + "/1",
        "9" * 5000 + "/7",
        "__import__('os').system('touch evaluated')",
        "__import__('os').system('touch evaluated')/1",
        "2**3",
        "8//255",
    ],
)
@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_what_is_no_fraction_is_refused_and_never_evaluated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, text: str
) -> None:
    arguments: list[str] = []
    if source == "flag":
        arguments = [f"--attack.epsilon={text}"]
    elif source == "environment":
        monkeypatch.setenv("TLA_ATTACK__EPSILON", text)
    else:
        arguments = write(folder, yaml.safe_dump({"attack": {"epsilon": text}}))
    with pytest.raises(ConfigError) as caught:
        load_settings(arguments)
    assert caught.value.subject == "attack.epsilon"
    assert str(caught.value).startswith(f"attack.epsilon={text[:250]}")
    assert not (folder / "evaluated").exists()


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.sampled_from(["", " ", "  "]))
@settings(max_examples=30)
def test_any_fraction_up_to_one(first: int, second: int, space: str) -> None:
    low, high = sorted((first, second))
    found = load_settings([f"--attack.epsilon={space}{low}{space}/{space}{high}", f"--attack.step_size={low}/{high}"])
    assert found.attack.epsilon == low / high


# --------------------------------------------------------------------------------- the command line and help


def test_flags_of_every_type() -> None:
    found = load_settings(
        [
            "--data.flip",
            "--no-mining.augment_pool",
            "--schedule.name=piecewise",
            "--schedule.milestones=3,5",
            "--scaling.num_workers=2",
            "--scaling.use_gpu=false",
            "--training.max_steps",
            "9",
            "--debug",
        ]
    )
    assert found.data.flip is True
    assert found.mining.augment_pool is False
    assert found.debug is True
    assert found.schedule.milestones == (3, 5)
    assert (found.scaling.num_workers, found.scaling.use_gpu, found.training.max_steps) == (2, False, 9)
    assert load_settings(["--scaling.num_workers=auto"]).scaling.num_workers == "auto"


def test_a_range_of_workers_comes_from_every_source(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert load_settings(["--scaling.num_workers=[2, 8]"]).scaling.num_workers == (2, 8)
    monkeypatch.setenv("TLA_SCALING__NUM_WORKERS", "[2, 8]")
    run = load_settings([]).run_config
    assert (run.scaling.num_workers, run.scaling.bounds(auto=1)) == ((2, 8), (2, 8))
    (tmp_path / "config.yaml").write_text(to_yaml(run))
    assert load_config_file(tmp_path / "config.yaml") == run


def flags(section: type[BaseModel] = RunSettings, prefix: str = "") -> list[tuple[str, str, object]]:
    """Every flag, its description and its default."""
    found: list[tuple[str, str, object]] = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += flags(field.annotation, f"{prefix}{name}.")
        else:
            found.append((prefix + name, field.description or "", field.get_default(call_default_factory=True)))
    return found


def test_help_shows_every_setting_with_description_range_and_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit) as stopped:
        load_settings(["--help"])
    assert stopped.value.code == 0
    options = dict(re.findall(r"^  --([\w.]+)[ ,]((?:.*\n)(?:   .*\n)*)", capsys.readouterr().out, flags=re.MULTILINE))
    expected = flags()
    assert len(expected) > 80
    for name, description, default in expected:
        shown = re.sub(r"\s+", " ", options[name])
        assert description, name
        assert re.sub(r"\s+", " ", description) in shown, name
        if not isinstance(default, dict | BaseModel):
            shown_as = {str(default), str(float(default))} if type(default) is int else {str(default)}
            assert any(f"(default: {text})" in shown for text in shown_as), name
        else:
            assert "(default: " in shown, name


def test_no_file_of_settings_contains_credentials() -> None:
    found = load_settings(["--preset=digits", "--tracking.uri=http://me:hunter2@mlflow:5000", "--print_config=yaml"])
    config = found.run_config
    for text in (print_config(found), to_yaml(config), sweep_yaml(config, SweepConfig())):
        assert "uri: http://mlflow:5000\n" in text
        assert "hunter2" not in text
    assert config.tracking.uri == "http://me:hunter2@mlflow:5000"
    assert RunConfig.model_validate(yaml.safe_load(to_yaml(config))).digest == config.digest


def test_print_config_prints_what_was_resolved() -> None:
    found = load_settings(["--preset=digits", "--seed=3", "--print_config=yaml"])
    assert RunConfig.model_validate(yaml.safe_load(print_config(found))) == found.run_config
    assert found.run_config.seed == 3
    schema = yaml.safe_load(print_config(load_settings(["--print_config=schema"])))
    assert set(schema["properties"]) == set(RunConfig.model_fields)


def test_environment_is_left_alone() -> None:
    before = dict(os.environ)
    load_settings(["--preset=digits"])
    assert dict(os.environ) == before


@pytest.mark.parametrize("value", ["one\ntwo", "-one\n", "a=b\nc"])
def test_a_value_of_several_lines_is_whole_or_refused(value: str) -> None:
    arguments = ["--preset", "digits", f"--tracking.experiment={value}"]
    with pytest.raises(ConfigError, match=r"tracking\.experiment|command line"):
        load_settings(arguments)
    assert [*loading._checked([f"--x={value}"])] == ["--x", value]


def test_no_setting_of_a_job_is_infinite() -> None:
    with pytest.raises(ConfigError, match=r"timeout_seconds=inf: input should be a finite number"):
        loading.read_settings(CheckupSettings, ["--timeout_seconds=inf"])
