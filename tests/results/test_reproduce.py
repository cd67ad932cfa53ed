"""A table from its command to its page: stopped on the way, gone on with, without ray and mlflow."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_core_alone import WITHOUT

ROOT = Path(__file__).parents[2]
FLAGS = "--table digits --budget 1 --seeds 1 --methods at --no-pools --side_by_side 1"
CODE = WITHOUT + f"import runpy; runpy.run_path({str(ROOT / 'jobs' / 'reproduce_paper.py')!r}, run_name='__main__')"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_table_is_made_in_pieces(tmp_path: Path) -> None:
    def reproduce(*more: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TLA_")}
        return subprocess.run(
            [sys.executable, "-c", CODE, *FLAGS.split(), "--no-log", *more],
            cwd=tmp_path,
            env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )

    cut = reproduce("--minutes", "0.02")
    assert cut.returncode == 75, cut.stderr
    assert "the time is up; the same command goes on" in cut.stdout
    assert "1 runs: `at-s0`" in (tmp_path / "docs" / "results" / "digits.md").read_text()
    whole = reproduce()
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "runs" / "tables" / "digits-1-minutes" / "at-s0"
    found = json.loads((run / "measured.json").read_text())
    assert found["accuracy"]["clean"]["images"] == 20
    assert found["accuracy"]["autoattack"]["estimate"] <= found["accuracy"]["clean"]["estimate"]
    assert [ratios["epsilon"] for ratios in found["shift"]] == pytest.approx([0.15, 0.225])
    assert not (run / "shards").exists()
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "best.safetensors", "config.yaml", "data.json", "manifest.json",
    ]  # fmt: skip
    page = (tmp_path / "docs" / "results" / "digits.md").read_text()
    assert f"{100 * found['accuracy']['clean']['estimate']:.1f}" in page
    assert "Not run yet" not in page
    before = (run / "measured.json").stat().st_mtime_ns
    again = reproduce()
    assert again.returncode == 0
    assert (run / "measured.json").stat().st_mtime_ns == before
