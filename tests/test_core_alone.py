"""The core imports and trains without ray, mlflow and boto3; imports are quick and do nothing."""

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import tla_service

WITHOUT = "import sys\nfor name in ('ray', 'mlflow', 'boto3', 'botocore', 'optuna'): sys.modules[name] = None\n"
CORE_ROOMS = (
    "attacks",
    "data",
    "evaluation",
    "inference",
    "models",
    "report",
    "results",
    "training",
    "triplets",
    "tuning",
)


def run_python(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TLA_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


ALONE = f"""{WITHOUT}
import importlib, json, runpy
from pathlib import Path
import tla_service.data
assert not {{"sklearn", "pyarrow", "torchvision"}} & set(sys.modules), "data imports what takes long"
try:
    tla_service.data.check_root("s3://b/x")
except tla_service.UnavailableError as error:
    print(error)
import tla_service.training.fit
from tla_service.models import build_model
build_model("digits_cnn", 10, (1, 8, 8))
assert "torchvision" not in sys.modules, "it takes as long to import as torch"
names, training, report, run = json.loads(sys.argv[1])

def start(job, *arguments):
    sys.argv = [job, *arguments]
    try:
        runpy.run_module(job, run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0, job

for name in names:
    importlib.import_module(name)
start("tla_service.training", *training)
(checkpoint,) = Path(run, "checkpoints").glob("step-*")
start("tla_service.report", *report, "--model", str(checkpoint))
import tla_service
limits = {{"train_limit": 200, "test_limit": 40}}
summary = tla_service.train(tla_service.load_config("digits", data=limits, training={{"epochs": 1}}), run)
assert tla_service.evaluate(summary["checkpoint"])["clean_accuracy"] == summary["clean_accuracy"]
print("the API agrees")
start("jobs.inspect_data")
"""


def test_the_core_imports_trains_and_evaluates_without_cluster_libraries(tmp_path: Path) -> None:
    """Every module, then the jobs that need no more, and the API on what they left."""
    root = Path(tla_service.__file__).parent
    names = [f"tla_service.{module.name}" for module in pkgutil.iter_modules([str(root)]) if not module.ispkg]
    for room in CORE_ROOMS:
        found = pkgutil.walk_packages([str(root / room)], f"tla_service.{room}.")
        names += [module.name for module in found if not module.name.endswith("__main__")]
    assert len(names) > 40
    run = tmp_path / "run"
    training = ["--preset", "digits", "--data.train_limit", "200", "--data.test_limit", "40", "--training.epochs", "1"]
    training += ["--output", str(run)]
    counts = {
        "attacks": 40,
        "autoattack": 0,
        "curves": 0,
        "sparse": 0,
        "corruptions": 0,
        "certified": 4,
        "audit": 0,
        "representation": 40,
        "bank": 40,
        "transfer": 0,
    }
    report = [argument for name, count in counts.items() for argument in (f"--images.{name}", str(count))]
    report += ["--attacks", '{"pgd5": {"num_steps": 5}}', "--detection.num_steps", "5", "--data.test_limit", "40"]
    report += ["--neighbours.k", "5", "--output", str(tmp_path / "report")]
    done = run_python(ALONE, json.dumps([names, training, report, str(run)]), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "clean accuracy" in done.stdout
    assert (run / "summary.json").exists()
    assert f"report  {tmp_path}/report/report.html" in done.stdout
    assert "<img" in (tmp_path / "report" / "report.html").read_text()
    assert "the API agrees" in done.stdout
    assert "data.root=s3://b/x: boto3 is not installed; pip install boto3\n" in done.stdout
    assert "splits        train 1" in done.stdout


@pytest.mark.parametrize(
    "module", ["tla_service", "tla_service.config", "tla_service.config.loading", "tla_service.registry"]
)
def test_reading_a_configuration_imports_no_heavy_library(module: str) -> None:
    heavy = "{'torch', 'ray', 'mlflow', 'boto3', 'sklearn', 'matplotlib', 'pyarrow'}"
    done = run_python(f"import sys, {module}\nprint(sorted({heavy} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


def test_tests_for_a_gpu_are_collected_without_other_packages() -> None:
    """As on a GPU machine with torch and little else; assertion rewriting needs the blocked modules to be absent."""
    code = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"ray", "mlflow", "boto3", "botocore", "foolbox", "torchattacks", "pyautoattack"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import pytest
sys.exit(pytest.main(["-q", "-m", "gpu", "--collect-only", "-p", "no:timeout", "-p", "no:xdist"]))
"""
    done = run_python(code, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_a_step_on_a_gpu_does_not_synchronize[True]" in done.stdout
