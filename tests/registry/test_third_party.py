"""Others check a report: the script of docs/evaluation.md, with a registered version and a real evaluation of it."""

import hashlib
import json
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from tests.registry.tracking_server import Packaged
from tests.report.subjects import trained
from tla_service.attacks.autoattack import run_autoattack
from tla_service.evaluation import suite
from tla_service.evaluation.shards import load_arrays, save_arrays
from tla_service.registry.evaluations import log_evaluation
from tla_service.registry.subject import load_subject
from tla_service.report.evaluate import evaluate
from tla_service.report.loading import load_models
from tla_service.report.schema import FILES, SCHEMA_FILE
from tla_service.report.settings import ReportSettings
from tla_service.report.tasks import MeasureHere
from tla_service.tracking.connection import client
from tla_service.training.reporting import Terminal

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
(SCRIPT,) = re.findall(r"^```python\n(# check_report\.py\n.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
ADDRESS = "models:/tla-digits/2"


@pytest.fixture(scope="module")
def evaluated(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A tracking store with a trained version, and the folder of its report, which is logged there."""
    folder = tmp_path_factory.mktemp("third")
    shutil.copy(template, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        # The first stage alone: Square takes a minute.
        patch.setattr(suite, "run_autoattack", partial(run_autoattack, only=["apgd-ce"]))
        packaged = Packaged(f"sqlite:///{folder / 'mlflow.db'}")
        packaged.log(state_dict=trained().state_dict())
        settings = ReportSettings.model_validate(
            {
                "model": ADDRESS,
                "output": folder / "report",
                "epsilon": 0.08,
                "data": {"name": "digits", "test_limit": 60},
                "attacks": {"pgd3": {"num_steps": 3, "step_size": 0.05}},
                "images": {
                    "curves": 0,
                    "sparse": 0,
                    "audit": 0,
                    "representation": 0,
                    "corruptions": 0,
                    "certified": 0,
                    "transfer": 0,
                },
                "page": False,
            }
        )
        models = load_models(settings, lambda address, field: load_subject(address, field, packaged.uri))
        report, output = evaluate(settings, models, MeasureHere, Terminal())
        files = {name: output / name for name in FILES if (output / name).is_file()}
        for _ in range(2):  # again changes nothing
            log_evaluation(packaged.uri, report, files)
        yield packaged.uri, output


@pytest.fixture
def check(evaluated: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Runs the script on a copy of the report that is changed first; its exit code and output."""
    (tmp_path / "check_report.py").write_text(SCRIPT)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", evaluated[0])

    def run(change: Callable[[Path], None]) -> tuple[Any, str]:
        shutil.copytree(evaluated[1], tmp_path / "report")
        change(tmp_path / "report")
        monkeypatch.setattr(sys, "argv", ["check_report.py", ADDRESS, str(tmp_path / "report")])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(tmp_path / "check_report.py"), run_name="__main__")
        return ended.value.code, capsys.readouterr().out

    return run


def change_report(folder: Path, *path: str, value: Any) -> None:
    """Set an entry of report.json."""
    report = entry = json.loads((folder / "report.json").read_text())
    for name in path[:-1]:
        entry = entry[name]
    assert path[-1] in entry
    entry[path[-1]] = value
    (folder / "report.json").write_text(json.dumps(report))


def change_images(change: Callable[[dict[str, Any]], None], *, hide: bool = True) -> Callable[[Path], None]:
    """Change the arrays; `hide` corrects their digest in the report."""

    def changed(folder: Path) -> None:
        file = folder / "adversarial.npz"
        arrays = load_arrays(file)
        change(arrays)
        save_arrays(arrays, file)
        if hide:
            change_report(folder, "adversarial", "sha256", value=hashlib.sha256(file.read_bytes()).hexdigest())

    return changed


def test_the_script_is_short() -> None:
    assert len([line for line in SCRIPT.splitlines() if line]) <= 32


def test_a_genuine_report_passes(check: Any, evaluated: tuple[str, Path]) -> None:
    report = json.loads((evaluated[1] / "report.json").read_text())
    jsonschema.validate(report, json.loads(SCHEMA_FILE.read_text()))
    assert 0 < report["accuracy"]["autoattack"]["estimate"] < report["accuracy"]["clean"]["estimate"] < 1
    written = {path.name for path in evaluated[1].iterdir()}
    assert written >= {"report.json", "outcome.npz", "autoattack.npz", "images.parquet", "adversarial.npz"}
    code, said = check(lambda _: None)
    assert (code, said.count("ok"), "FAILED" in said) == (0, 8, False), said


def without_gate_images(arrays: dict[str, Any]) -> None:
    kept = ~arrays["gate"]
    arrays |= {name: values[kept] for name, values in arrays.items()}


def test_a_report_whose_autoattack_met_no_gate_image_passes(check: Any) -> None:
    def change(folder: Path) -> None:
        change_images(without_gate_images)(folder)
        change_report(folder, "adversarial", "images", value=len(load_arrays(folder / "adversarial.npz")["gate"]))
        change_report(folder, "gate", "accuracy", "autoattack", "estimate", value=None)

    code, said = check(change)
    assert (code, said.count("ok"), "FAILED" in said) == (0, 8, False), said


def one_pixel_far(arrays: dict[str, Any]) -> None:
    arrays["x_adv"][0, 0, 0, 0] = arrays["x_test"][0, 0, 0, 0] + (
        0.0801 if arrays["x_test"][0, 0, 0, 0] < 0.5 else -0.0801
    )


def clean_images(arrays: dict[str, Any]) -> None:
    arrays["x_adv"] = arrays["x_test"]


def one_label(arrays: dict[str, Any]) -> None:
    arrays["y_test"][np.flatnonzero(~arrays["gate"])[0]] += 1


def one_index(arrays: dict[str, Any]) -> None:
    arrays["index"][0] += 1


def twice(arrays: dict[str, Any]) -> None:
    arrays |= {name: np.concatenate([values, values]) for name, values in arrays.items()}


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        (change_images(one_pixel_far), "in the ball"),
        (change_images(clean_images), "accuracy under AutoAttack"),
        (change_images(one_label), "clean accuracy"),
        (change_images(twice), "number of images"),
        (change_images(one_index, hide=False), "digest"),
        (lambda folder: change_report(folder, "accuracy", "autoattack", "estimate", value=0.5), "accuracy under"),
        (lambda folder: change_report(folder, "accuracy", "clean", "estimate", value=1.0), "clean accuracy"),
        (lambda folder: change_report(folder, "threat_model", "epsilon", value=0.079), "in the ball"),
    ],
)
def test_a_tampered_report_fails(check: Any, change: Any, failed: str) -> None:
    code, said = check(change)
    assert code == 1
    assert any(failed in line and "FAILED" in line for line in said.splitlines()), said


def test_the_logged_model_has_the_figures_and_the_data_set(evaluated: tuple[str, Path]) -> None:
    made = client(evaluated[0])
    version = made.get_model_version("tla-digits", "2")
    report = json.loads((evaluated[1] / "report.json").read_text())
    metrics = made.get_logged_model(version.tags["model_id"]).metrics or []
    assert len({each.key for each in metrics}) == len(metrics)
    found = {each.key: (each.value, each.dataset_name, each.dataset_digest) for each in metrics}
    expected = report["accuracy"]["autoattack"]["estimate"], "digits", report["data"]["fingerprint"]
    assert found["evaluation/linf-0.08/accuracy/autoattack"] == expected
