"""The core imports and trains without ray, mlflow and boto3; imports are quick and do nothing."""

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


def test_every_module_of_the_core_imports_without_cluster_libraries() -> None:
    root = Path(tla_service.__file__).parent
    names = [f"tla_service.{module.name}" for module in pkgutil.iter_modules([str(root)]) if not module.ispkg]
    for room in CORE_ROOMS:
        found = pkgutil.walk_packages([str(root / room)], f"tla_service.{room}.")
        names += [module.name for module in found if not module.name.endswith("__main__")]
    assert len(names) > 40
    done = run_python(WITHOUT + f"import importlib\nfor name in {names}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


def test_the_core_trains_and_evaluates_without_cluster_libraries(tmp_path: Path) -> None:
    arguments = ["--preset", "digits", "--data.train_limit", "200", "--data.test_limit", "40", "--training.epochs", "1"]
    code = f"{WITHOUT}sys.argv[1:1] = []\nimport runpy\nrunpy.run_module('tla_service.training', run_name='__main__')"
    done = run_python(code, *arguments, "--output", str(tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "clean accuracy" in done.stdout
    assert (tmp_path / "run" / "summary.json").exists()
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
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
    arguments = [argument for name, count in counts.items() for argument in (f"--images.{name}", str(count))]
    arguments += ["--attacks", '{"pgd5": {"num_steps": 5}}', "--detection.num_steps", "5", "--data.test_limit", "40"]
    arguments += ["--neighbours.k", "5", "--model", str(checkpoint), "--output", str(tmp_path / "report")]
    done = run_python(code.replace("tla_service.training", "tla_service.report"), *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"report  {tmp_path}/report/report.html" in done.stdout
    assert "<img" in (tmp_path / "report" / "report.html").read_text()


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
