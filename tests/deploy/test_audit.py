"""`make audit`: a bill of materials of what is locked, and one clear message without a network."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow  # makes a virtual environment


def audit(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    (folder / "deploy").mkdir()
    shutil.copy(ROOT / "deploy" / "audit.sh", folder / "deploy")
    shutil.copy(ROOT / "requirements.lock", folder)
    command = [str(folder / "deploy" / "audit.sh")]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)


def test_without_an_index_it_says_so(tmp_path: Path) -> None:
    done = audit(tmp_path, PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull, PIP_FIND_LINKS="")
    assert (done.returncode, done.stdout) == (3, "")
    assert re.fullmatch(r"error: make audit: its tools cannot be installed .*; check the network.*\n", done.stderr)


def test_the_bill_of_materials_has_every_locked_package(tmp_path: Path) -> None:
    done = audit(tmp_path)
    if "cannot be installed" in done.stderr:
        pytest.skip("pip needs an index with the tools of the audit")
    assert done.returncode in (0, 1, 3), done
    assert done.returncode != 3 or re.fullmatch(r"error: .*database of vulnerabilities.*; .*\n", done.stderr)
    made = json.loads((tmp_path / "build" / "sbom.json").read_text())
    assert made["bomFormat"] == "CycloneDX"
    locked = re.findall(r"^([\w.-]+)==([\w.+-]+)", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    assert {(part["name"], part["version"]) for part in made["components"]} == set(locked)
    assert all(part["purl"].startswith("pkg:pypi/") for part in made["components"])
