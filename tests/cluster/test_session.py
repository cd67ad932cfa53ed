"""How many workers a cluster gives a run, and whether they can share its steps."""

import pytest
import ray

from tla_service.cluster.session import place
from tla_service.config import RunConfig
from tla_service.errors import ConfigError


def test_a_pool_that_the_clusters_gpus_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `auto` workers nobody knows the number before the cluster tells."""
    mining = {"pool": "separate", "scope": "global", "pool_size": 500}
    run = RunConfig.model_validate({"mining": mining})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 3.0, "CPU": 16.0})
    with pytest.raises(ConfigError, match=r"mining\.pool_size=500: not divisible by 3 workers.*; use 498 or 501"):
        place(run)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 4.0, "CPU": 16.0})
    assert place(run).num_workers == 4
