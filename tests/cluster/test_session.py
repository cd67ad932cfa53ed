"""How many workers a cluster gives a run, and what is checked before one is started or asked."""

import os
from pathlib import Path

import pytest
import ray
from ray.exceptions import AuthenticationError

from tests.conftest import S3Server
from tla_service.cluster.session import check_storage, place, ray_session
from tla_service.config import RunConfig
from tla_service.errors import ConfigError, UnavailableError


def test_a_pool_that_the_clusters_gpus_cannot_share_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of `auto` workers nobody knows the number before the cluster tells."""
    mining = {"pool": "separate", "scope": "global", "pool_size": 500}
    run = RunConfig.model_validate({"mining": mining})
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 3.0, "CPU": 16.0})
    with pytest.raises(ConfigError, match=r"mining\.pool_size=500: not divisible by 3 workers.*; use 498 or 501"):
        place(run)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 4.0, "CPU": 16.0})
    assert place(run).num_workers == 4


def test_storage_that_can_be_written_is_accepted(s3: S3Server, tmp_path: Path) -> None:
    check_storage(f"s3://{s3.bucket}/runs")
    check_storage(str(tmp_path / "new" / "folder"))
    assert list((tmp_path / "new" / "folder").iterdir()) == []


@pytest.mark.parametrize(
    ("bucket", "variables", "reason", "remedy"),
    [
        ("nowhere", {}, "NO_SUCH_BUCKET", "create the bucket, or correct its name"),
        ("images", {"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE"}, "INVALID_ACCESS_KEY_ID", "check AWS_ACCESS_KEY_ID"),
        (
            "images",
            {"AWS_SECRET_ACCESS_KEY": "wrong"},
            "SIGNATURE",
            "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ),
        ("images", {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1"}, "NETWORK_CONNECTION", "check AWS_ENDPOINT_URL_S3"),
    ],
)
def test_each_cause_of_an_unusable_bucket_has_its_own_remedy(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch, bucket: str, variables: dict[str, str], reason: str, remedy: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UnavailableError) as caught:
        check_storage(f"s3://{bucket}/runs")
    assert reason in caught.value.reason
    assert remedy in caught.value.remedy


def test_storage_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^scaling\.storage=s4://a/b: no address of a storage .*; give a folder, or s3"
    ):
        check_storage("s4://a/b")
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match=r"file/runs: cannot be written \(not a directory\); give a folder that"):
        check_storage(str(tmp_path / "file" / "runs"))


@pytest.mark.parametrize(
    ("error", "reason", "remedy"),
    [
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.9.1\nThis"),
            "another version of Ray or Python (The cluster was started with: Ray: 2.9.0 Python: 3.9.1",
            "install the cluster's versions here",
        ),
        (AuthenticationError("Token"), "the cluster refuses the token", "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN"),
        (ConnectionError("ray.init() failed"), "no Ray cluster answers", "ray start --head"),
    ],
)
def test_a_cluster_that_cannot_be_joined(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str, remedy: str
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", fail)
    run = RunConfig.model_validate({"scaling": {"address": "auto"}})
    with pytest.raises(UnavailableError) as caught, ray_session(run):
        pass
    assert caught.value.reason.startswith(reason)
    assert remedy in caught.value.remedy


def test_a_folder_too_deep_for_rays_sockets_is_refused_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    started: list[object] = []
    monkeypatch.setattr(ray, "init", lambda *_, **options: started.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 60)))
    with pytest.raises(UnavailableError) as caught, ray_session(RunConfig()):
        pass
    assert str(caught.value).startswith(f"TMPDIR={tmp_path}/xxx")
    assert "at most 107 work; set RAY_TMPDIR to a short folder on a local disk, such as /tmp" in str(caught.value)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 60)))
    with pytest.raises(UnavailableError, match=r"^RAY_TMPDIR="), ray_session(RunConfig()):
        pass
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAY_TMPDIR", "/dev/null/tmp")
    with pytest.raises(
        UnavailableError, match=r"^RAY_TMPDIR=/dev/null/tmp: Ray cannot write there \(not a directory\)"
    ):
        with ray_session(RunConfig()):
            pass
    assert started == []
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    with ray_session(RunConfig()):
        pass
    assert len(started) == 1


def test_a_length_that_ray_refuses_is_refused_here_and_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray's own check, on the path that Ray makes."""
    from ray._private.utils import validate_socket_filepath

    from tla_service.cluster.session import _check_temporary_folder

    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: None)
    session = f"ray/session_2026-11-26_14-11-37_222600_{os.getpid()}/sockets/plasma_store"
    verdicts = set()
    for length in range(20, 60):
        folder = "/" + "x" * length
        monkeypatch.setenv("RAY_TMPDIR", folder)
        try:
            validate_socket_filepath(f"{folder}/{session}")
            fits = True
        except OSError:
            fits = False
        with pytest.raises(UnavailableError) as caught:  # the folder is not there
            _check_temporary_folder()
        assert ("too long" in caught.value.reason) == (not fits), length
        verdicts.add(fits)
    assert verdicts == {True, False}
