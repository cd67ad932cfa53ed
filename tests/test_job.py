"""What a job says last: the command to run next."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from tla_service import job
from tla_service.job import code_version, next_command, run_job


def test_the_next_command_can_be_typed_in_the_shell_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["jobs/train_tla.py", "--preset", "digits"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.chdir(tmp_path)
    line = next_command("evaluate_tla.py", "--model", "models:/tla-digits/1")
    assert line == "next: .venv/bin/python jobs/evaluate_tla.py --model models:/tla-digits/1"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    line = next_command("train_tla.py", "--config", "my runs/best.yaml")
    assert shlex.split(line) == ["next:", "python", "jobs/train_tla.py", "--config", "my runs/best.yaml"]


def test_commands_and_errors_show_no_credentials(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "http://me:hunter2@mlflow:5000"
    assert next_command("promote_model.py", "--tracking.uri", uri).endswith("--tracking.uri http://mlflow:5000")

    def main() -> int:
        raise ValueError(f"request to {uri} failed")

    monkeypatch.setattr(sys, "argv", ["jobs/train_tla.py"])
    assert run_job(main) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.endswith("error: request to http://mlflow:5000 failed\n")
    assert "hunter2" not in printed


def test_the_repository_around_an_environment_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / ".venv" / "tla_service"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message", "theirs"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(job, "__file__", str(package / "job.py"))
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert "tla.git_commit" not in code_version()
    subprocess.run([*git, "add", str(package)], check=True)
    assert "tla.git_commit" in code_version()


def run(body: str, output: IO[bytes] | int) -> "subprocess.CompletedProcess[bytes]":
    code = f"import sys\nfrom tla_service.job import run_job\ndef main():\n    {body}\nsys.exit(run_job(main))"
    return subprocess.run([sys.executable, "-c", code], stdout=output, stderr=subprocess.PIPE, check=False)


@pytest.mark.parametrize("body", ["print('x' * 10**6)", "print('x')"])
def test_a_reader_that_has_seen_enough_is_no_error(body: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as output:
        done = run(body, output)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_broken_connection_is_an_error() -> None:
    done = run("raise BrokenPipeError(32, 'Broken pipe')", subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.endswith(b"error: [Errno 32] Broken pipe\n")
