"""One version of each thing, wherever it is written; and no secret anywhere."""

import re
import subprocess
from pathlib import Path

import pytest

import tla_service
from tests.deploy.test_image import locked

ROOT = Path(__file__).parents[2]
DEPLOYED = [
    ROOT / "Dockerfile",
    *(path for path in sorted((ROOT / "deploy").rglob("*")) if path.is_file() and "secrets" not in path.parts),
]
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (*DEPLOYED, ROOT / "docs" / "operations.md")
    if "__pycache__" not in path.parts and "data" not in path.parts
}


def found(pattern: str) -> dict[str, set[str]]:
    """Every value that a pattern's group takes, by file."""
    return {name: set(hits) for name, text in TEXTS.items() if (hits := re.findall(pattern, text))}


def test_the_projects_version() -> None:
    hits = found(r"tla-service:(\d+\.\d+\.\d+)") | found(r'image\.version="([\d.]+)"') | found(r"newTag: ([\d.]+)")
    assert {"Dockerfile", "deploy/compose/.env", "docs/operations.md"} <= set(hits)
    assert set.union(*hits.values()) == {tla_service.__version__}


def test_rays_version() -> None:
    hits = found(r'rayVersion: "([\d.]+)"') | found(r"\bRay (\d+\.\d+\.\d+)")
    assert len(hits) >= 5
    assert set.union(*hits.values()) == {locked("ray")}


def test_mlflow_and_torch_in_the_documents() -> None:
    hits = found(r"\bMLflow (\d+\.\d+\.\d+)")
    assert set.union(set(), *hits.values()) <= {locked("mlflow")}
    hits = found(r"\btorch==([\d.]+)\+cpu")
    assert set.union(*hits.values()) == {locked("torch")}


@pytest.mark.parametrize("image", ["postgres", "versity/versitygw", "prom/prometheus", "grafana/grafana", "python"])
def test_other_images(image: str) -> None:
    hits = found(rf"\b{image}:(v?[\d.]+[\w.@:-]*)")
    tags = {tag.partition("@")[0] for tags in hits.values() for tag in tags}
    assert len(tags) == 1, hits


def test_the_lock_allows_what_the_project_asks_for() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for package, text in re.findall(r'"(ray|mlflow)\[?[\w,]*\]?>=([\d.]+)', project):
        lowest, pinned = (tuple(map(int, version.split("."))) for version in (text, locked(package)))
        assert lowest <= pinned, package


SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|"
    r"(?i:password|secret[_-]?(?:access[_-])?key|token)[\w-]*\s*[:=]\s*[\"']?(?!/)[A-Za-z0-9+/_-]{12,}[\"']?\s*$",
    flags=re.MULTILINE,
)


def test_no_secret_is_written_down() -> None:
    assert {name: hits for name, text in TEXTS.items() if (hits := SECRET.findall(text))} == {}
    tracked = subprocess.run(["git", "ls-files", "deploy"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not re.findall(r"secrets/|auth_token|credentials|\.pem|\.key", tracked)


@pytest.mark.parametrize(
    "line", ["PGPASSWORD: hunter2hunter2", 'token = "0123456789abcdef"', "aws_secret_access_key=AbCdEfGhIjKlMnOp"]
)
def test_a_secret_would_be_found(line: str) -> None:
    assert SECRET.search(f"x: 1\n  {line}\n")
