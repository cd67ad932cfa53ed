"""The Dockerfile: a linter's word, pins that agree with the lock, and what the image must not hold."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.image.rehearse import instructions

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
STEPS = list(instructions(DOCKERFILE))
LAST_STAGE = STEPS[max(place for place, (keyword, _) in enumerate(STEPS) if keyword == "FROM") :]


def locked(package: str) -> str:
    found = re.search(rf"^{package}==([\w.]+)", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    assert found, package
    return found[1]


def test_the_linter_has_nothing_to_say() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("hadolint")), str(DOCKERFILE)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_would_speak_up(tmp_path: Path) -> None:
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(DOCKERFILE.read_text().replace("USER 1000:1000\n", "USER root\n"))
    linter = str(Path(sys.executable).with_name("hadolint"))
    assert subprocess.run([linter, str(wrong)], capture_output=True, check=False).returncode != 0


def test_the_base_image_is_pinned_by_digest_and_used_by_all_stages() -> None:
    given = dict(rest.split("=", 1) for keyword, rest in STEPS if keyword == "ARG" and "=" in rest)
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm@sha256:[0-9a-f]{64}", given["PYTHON_IMAGE"])
    origins = {rest.split()[0] for keyword, rest in STEPS if keyword == "FROM"}
    assert origins == {"${PYTHON_IMAGE}", "dependencies"}


def test_everything_from_the_index_is_compared_with_a_hash() -> None:
    fetching = [rest for keyword, rest in STEPS if keyword == "RUN" and re.search(r"\bpip\b", rest)]
    commands = [
        command
        for rest in fetching
        for command in re.split(r"&&|;;", rest)
        if re.search(r"\bpip\b.*(install|wheel)", command)
    ]
    assert len(commands) >= 5
    unchecked = [command for command in commands if "--require-hashes" not in command and "--no-index" not in command]
    assert [re.findall(r'"(\w+==)', command) for command in unchecked] == [["torchvision=="]]


def test_ray_up_finds_in_the_container_what_it_calls() -> None:
    (installed,) = [rest for keyword, rest in LAST_STAGE if keyword == "RUN" and "apt-get install" in rest]
    assert {"openssh-client", "rsync"} <= set(installed.split())
    assert "PATH=/opt/tla/bin" in installed, "login shells reset PATH"
    assert "> /etc/profile.d/tla.sh" in installed


def test_torch_without_cuda_is_the_locked_torch() -> None:
    pins = (ROOT / "deploy" / "image" / "torch-cpu.txt").read_text()
    assert re.findall(r"^(\w+)==(\S+)", pins, flags=re.MULTILINE) == [("torch", f"{locked('torch')}+cpu")]
    assert len(re.findall(r"--hash=sha256:[0-9a-f]{64}", pins)) == 2


def test_leaving_cuda_out_leaves_the_rest_in() -> None:
    drop = re.search(r"awk '(.+?)'", DOCKERFILE.read_text())
    assert drop
    lock = (ROOT / "requirements.lock").read_text()
    kept = subprocess.run(["awk", drop[1]], input=lock, capture_output=True, text=True, check=True).stdout
    before, after = (set(re.findall(r"^([\w-]+)==", text, flags=re.MULTILINE)) for text in (lock, kept))
    gone = before - after
    assert {"torch", "torchvision", "triton", "nvidia-nccl-cu13", "cuda-toolkit"} <= gone
    assert all(re.match(r"torch(vision)?$|triton$|nvidia-|cuda-", name) for name in gone)
    assert "nvidia-ml-py" in after
    assert "nvidia-cublas" not in kept.replace("# via nvidia-cublas", "")


def test_the_last_stage_runs_as_nobody_special_and_holds_no_compiler() -> None:
    users = [rest for keyword, rest in LAST_STAGE if keyword == "USER"]
    assert users == ["1000:1000"]
    variables = " ".join(rest for keyword, rest in LAST_STAGE if keyword == "ENV")
    assert re.findall(r"(?:XDG_CACHE_HOME|MPLCONFIGDIR)=(/tmp/\S+)", variables) == [
        "/tmp/cache",
        "/tmp/cache/matplotlib",
    ]
    run = " ".join(rest for keyword, rest in LAST_STAGE if keyword == "RUN")
    assert not re.search(r"\b(gcc|g\+\+|clang|build-essential|python3-dev)\b", run)
    assert {"HEALTHCHECK", "LABEL"} <= {keyword for keyword, _ in LAST_STAGE}


def test_the_context_holds_only_what_is_listed() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    copied = {
        word.rstrip("/")
        for keyword, rest in STEPS
        if keyword == "COPY" and "--from" not in rest
        for word in [word for word in rest.split() if not word.startswith("--")][:-1]
    }
    assert copied == {line.removeprefix("!") for line in lines if line.startswith("!")}


@pytest.mark.parametrize("word", ["password", "secret", "token=", "aws_"])
def test_no_secret_is_a_build_argument_or_a_variable_of_the_image(word: str) -> None:
    named = [rest.lower() for keyword, rest in STEPS if keyword in ("ARG", "ENV", "LABEL")]
    assert not [rest for rest in named if word in rest.replace("ray_auth_mode=token", "")]


def test_the_parser_reads_continued_lines_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text("# a comment\nFROM base AS one\nRUN first \\\n# not part\n  && second\nUSER 1\n")
    assert list(instructions(path)) == [("FROM", "base AS one"), ("RUN", "first \\\n  && second"), ("USER", "1")]
