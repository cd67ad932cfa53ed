"""Naming the room must cost nothing: mlflow takes seconds to import."""

import subprocess
import sys
from pathlib import Path

import pytest

from tla_service import registry


def test_importing_the_room_imports_neither_mlflow_nor_torch() -> None:
    code = "import sys, tla_service.registry; assert not {'mlflow', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True, timeout=60)


def test_every_public_name_is_there_and_no_other() -> None:
    for name in registry.__all__:
        assert getattr(registry, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = registry.nothing
