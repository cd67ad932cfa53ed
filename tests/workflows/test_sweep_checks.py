"""What a sweep checks before its first trial."""

from pathlib import Path
from typing import Any

import pytest

from tests.tuning.conftest import run_config, space_of
from tla_service.cluster.storage import Folder
from tla_service.data import load_dataset
from tla_service.errors import ConfigError
from tla_service.models import Architecture
from tla_service.workflows.run import Facts
from tla_service.workflows.sweep import _check_code, _check_ends

FINE: dict[str, Any] = {"model": {"pretrained": "w.pt"}}


@pytest.mark.parametrize(
    ("run", "space"),
    [
        (FINE, {"model.name": ["digits_cnn", "mnist_mlp"]}),
        (FINE, {"model.head": ["keep", "new"]}),
        ({}, {"start": {"variants": {"random": {}, "trained": {"model.pretrained": "w.pt"}}}}),
    ],
)
def test_all_trials_start_from_the_same_weights(run: dict[str, Any], space: dict[str, Any]) -> None:
    config = run_config(**run)
    facts = Facts(load_dataset(config.data), Architecture.of(config.model), {}, (), 0, {})
    with pytest.raises(ConfigError, match=r"sweep\.space\.(model\.\w+|start)=.*the same pretrained weights"):
        _check_ends(space_of(space, run=config), facts, 1)
    _check_ends(space_of({"loss.clean_weight": [0, 0.5]}, run=config), facts, 1)


def test_a_sweep_goes_on_with_the_code_it_began_with(tmp_path: Path) -> None:
    storage, run = Folder(str(tmp_path)), run_config()
    _check_code(run, storage, None)
    _check_code(run, storage, "a" * 64)
    _check_code(run, storage, "a" * 64)
    for other in ("b" * 64, None):
        with pytest.raises(ConfigError, match=r"^model\.code.*choose another --sweep.name"):
            _check_code(run, storage, other)
