"""The inspection as a command: output, files, and exit codes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import inspect_data
from tests.data.conftest import encoded
from tests.jobs.conftest import Run
from tla_service.job import run_job

JOB = "inspect_data"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    draws = np.random.default_rng(0)
    for split, count in (("train", 70), ("test", 4)):
        for number in range(count):
            path = tmp_path / "root" / split / ("cat", "dog")[number % 2] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(draws.integers(0, 256, (9, 9, 3), np.uint8)))
    return tmp_path / "root"


def test_what_is_printed_and_written(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data.name", "image_folder", "--data.root", str(root), "--data.cache_dir", str(tmp_path / "cache")]
    monkeypatch.setattr(sys, "argv", ["inspect_data.py", *flags, "--output", str(tmp_path / "out")])
    assert run_job(inspect_data.main) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    assert "splits        train 63, validation 7, test 4" in printed
    assert "largest 9x9, most frequent 9x9 (0 differ)" in printed
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.size[1] == 2 * 68 + 24
    assert json.loads((tmp_path / "out" / "inspection.json").read_text())["classes"]["dog"]["test"] == 2


def test_exit_codes(root: Path, tmp_path: Path, run_in_process: Run) -> None:
    folder = ("--data.name", "image_folder", "--data.root", str(root), "--data.cache_dir", str(tmp_path / "cache"))
    assert run_in_process(*folder) == (0, "")
    code, said = run_in_process("--data.name", "image_folder", "--data.root", str(tmp_path / "nowhere"))
    assert (code, "no such file or folder; check the path" in said) == (3, True)
    code, said = run_in_process(*folder, "--data.test", "exam")
    assert (code, "error: data.test=exam: no such split in" in said) == (2, True)
    code, said = run_in_process(*folder, "--data.balance", "loss")
    assert (code, "data.balance=loss: not one of none, class_weights, sampling" in said) == (2, True)
    (tmp_path / "file").write_text("")
    code, said = run_in_process(*folder, "--output", str(tmp_path / "file"))
    assert (code, "error: output=" in said) == (3, True)
    damaged = root / "train" / "dog" / "03.png"
    damaged.write_bytes(damaged.read_bytes()[:80])
    code, said = run_in_process(*folder)
    assert (code, said.count("\n")) == (3, 1)
    assert f"error: data.root={damaged}: not a readable image" in said
