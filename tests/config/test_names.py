"""Names that end in MLflow: what it refuses is refused where settings are read, and the rest is left alone."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException
from mlflow.utils import validation
from pydantic import TypeAdapter, ValidationError

from tests.config.refusal import refusal
from tla_service.config.fields import AttackName, ExperimentName, ModelName, TagName
from tla_service.config.loading import load_settings, read_settings
from tla_service.errors import ConfigError
from tla_service.registry.job_settings import ImportSettings, PromoteSettings
from tla_service.report.settings import EvaluateSettings

WRONG = [
    ("--tracking.registered_model=team/digits", "tracking.registered_model=team/digits", "cannot contain /"),
    ("--tracking.registered_model=a:b", "tracking.registered_model=a:b", "cannot contain :"),
    ("--tracking.registered_model=o'neil", "tracking.registered_model=o'neil", "cannot contain '"),
    ("--tracking.registered_model=a@b", "tracking.registered_model=a@b", "cannot contain @"),
    ("--tracking.registered_model=..", "tracking.registered_model=..", "not a valid name"),
    ("--tracking.registered_model=m-1", "tracking.registered_model=m-1", "model ids in MLflow"),
    (f"--tracking.registered_model={'x' * 300}", f"tracking.registered_model={'x' * 300}", "at most 200 characters"),
    (
        f"--tracking.experiment={'x' * 600}",
        f"tracking.experiment={'x' * 250}...{'x' * 40} (600 characters)",
        "at most 256 characters",
    ),
    ("--tracking.experiment= ", "tracking.experiment= ", "not a printable name"),
    ('--tracking.tags={"owner%": "x"}', "tracking.tags=owner%", "that MLflow allows"),
    ('--tracking.tags={"": "x"}', "tracking.tags=", "not normalized"),
    ('--tracking.tags={"a//b": "x"}', "tracking.tags=a//b", "not normalized"),
    ('--tracking.tags={"tla.method": "x"}', "tracking.tags=tla.method", "set by the run itself"),
    (f'--tracking.tags={{"{"k" * 240}": "x"}}', f"tracking.tags={'k' * 240}", "at most 236 characters"),
    (
        f'--tracking.tags={{"note": "{"x" * 9000}"}}',
        f"tracking.tags.note={'x' * 250}...{'x' * 40} (9000 characters)",
        "at most 8000 characters",
    ),
    (
        '--evaluation.test={"PGD-20, eps=8/255 (strong!)": {"kind": "fgsm"}}',
        "evaluation.test=PGD-20, eps=8/255 (strong!)",
        "that MLflow allows",
    ),
    ('--evaluation.test={"../up": {}}', "evaluation.test=../up", "not normalized"),
    ('--evaluation.test={"": {}}', "evaluation.test=", "not normalized"),
    ('--evaluation.test={"worst": {}}', "evaluation.test.worst=worst", "reserved"),
    (f"--name={'n' * 241}", f"name={'n' * 241}", "at most 240 characters"),
]


@pytest.mark.parametrize(("flag", "head", "reason"), WRONG, ids=[row[0][:60] for row in WRONG])
def test_refused_where_settings_are_read(flag: str, head: str, reason: str) -> None:
    error = refusal([flag])
    assert str(error).startswith(f"{head}: ")
    assert reason in error.reason
    assert error.exit_code == 2


def test_every_job_with_a_tracking_section_asks() -> None:
    for kind, arguments in ((EvaluateSettings, ["--model=a"]), (PromoteSettings, ["--model=a", "--version=1"])):
        with pytest.raises(ConfigError, match=r"^tracking\.experiment= : "):
            read_settings(kind, [*arguments, "--tracking.experiment= "])  # type: ignore[type-var]
    with pytest.raises(ConfigError, match=r"^name=a/b: a registered model's name cannot contain /"):
        read_settings(ImportSettings, ["--file=w.pt", "--name=a/b"])
    with pytest.raises(ConfigError, match=r"^epsilon=8: outside .*write 8/255"):
        read_settings(ImportSettings, ["--file=w.pt", "--epsilon=8"])
    with pytest.raises(ConfigError, match=r"^attacks=a%: .* MLflow allows"):
        read_settings(EvaluateSettings, ["--model=a", '--attacks={"a%": {}}'])
    for alias in ("latest", "v3", "a b", "a/b"):
        with pytest.raises(ConfigError, match=r"^alias="):
            read_settings(PromoteSettings, ["--model=a", "--version=1", f"--alias={alias}"])


def test_usual_names_are_taken() -> None:
    found = load_settings(
        [
            "--tracking.registered_model=Team digits (v2), été",
            "--tracking.experiment=/Users/somebody@example.com/tla",
            '--tracking.tags={"team": "o\'neil", "mlflow.note.content": "50 %", "cost center/x": ""}',
            '--evaluation.test={"PGD 20 (8:255)": {}}'.replace("(", "").replace(")", ""),
        ]
    )
    assert json.loads(json.dumps(found.tracking.tags))["cost center/x"] == ""


def mlflow_takes(check: object, *arguments: str) -> bool:
    try:
        check(*arguments)  # type: ignore[operator]
    except MlflowException:
        return False
    return True


@given(st.text(max_size=12) | st.text("/.:-_ ab%'\n\u00e9", max_size=8))
@example("..0")
def test_what_is_accepted_here_mlflow_accepts(name: str) -> None:
    def accepted(kind: object) -> bool:
        try:
            TypeAdapter(kind).validate_python(name)
        except ValidationError:
            return False
        return True

    if accepted(AttackName):
        assert mlflow_takes(validation._validate_metric, f"test/robust_accuracy/{name}", 0.5, 0, 0)
        assert mlflow_takes(validation._validate_param, f"evaluation.test.{name}.num_restarts", "1")
    if accepted(TagName):
        assert mlflow_takes(validation._validate_tag, name, "x")
        assert mlflow_takes(validation._validate_param, f"tracking.tags.{name}", "x")
    if name and accepted(ModelName):
        assert mlflow_takes(validation._validate_model_name, name)
    if accepted(ExperimentName):
        assert mlflow_takes(validation._validate_experiment_name, name)
