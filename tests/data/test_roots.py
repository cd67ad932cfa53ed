"""``data.root``: what is found, and what is refused."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tla_service.config import DataConfig
from tla_service.data.roots import check_root, required_root
from tla_service.errors import ConfigError, UnavailableError


def required(root: str | None, **fields: Any) -> Path:
    return required_root(DataConfig(name="mnist", root=root, **fields))


def test_a_good_root_passes_the_check_without_a_copy(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put("roots/x", b"body")
    monkeypatch.setenv("HOME", str(tmp_path))
    check_root("s3://images/roots")
    check_root("s3://images/roots/x")
    check_root(str(tmp_path))
    check_root(None)
    assert not list(tmp_path.iterdir())


def test_roots_are_local_paths(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sets").mkdir()
    assert required("~/sets") == tmp_path / "sets"
    assert required(str(tmp_path / "new"), download=True) == tmp_path / "new"
    assert (tmp_path / "new").is_dir()
    s3.put("roots/x", b"body")
    assert (required("s3://images/roots", cache_dir=str(tmp_path / "cache")) / "x").read_bytes() == b"body"


@pytest.mark.parametrize("function", [check_root, required])
def test_roots_that_are_not_there_are_refused(function: Callable[[str], object], tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"data\.root=.*/nowhere: no such file or folder"):
        function(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"data\.root=gs://bucket/x: only local paths and s3://"):
        function("gs://bucket/x")
    with pytest.raises(ConfigError, match="names no bucket"):
        function("s3:///x")


def test_a_set_that_is_not_embedded_needs_a_root() -> None:
    with pytest.raises(ConfigError, match=r"data\.root: mnist is not embedded; give a folder, or s3://bucket/prefix"):
        required(None)


def test_unreadable_roots_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may read everything, so the answer of the system is what is replaced.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UnavailableError, match="no permission"):
        check_root(str(tmp_path))
