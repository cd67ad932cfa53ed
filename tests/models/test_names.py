import subprocess
import sys

import pytest

import tla_service.models
from tla_service.models.catalog import _NETWORKS
from tla_service.models.names import MODEL_DESCRIPTIONS, model_names


def test_names_and_builders_are_the_same_set() -> None:
    assert model_names() == tuple(_NETWORKS)
    assert all(MODEL_DESCRIPTIONS[name] for name in model_names())


def test_names_can_be_read_without_torch() -> None:
    code = "import sys, tla_service.models.names as n; n.model_names(); print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert answer.strip() == "False"


def test_package_exports_resolve() -> None:
    for name in tla_service.models.__all__:
        assert getattr(tla_service.models, name).__name__ == name
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = tla_service.models.no_such_thing
