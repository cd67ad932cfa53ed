"""What is checked before a cluster is started or asked."""

import os
import socket
from pathlib import Path
from unittest.mock import Mock

import pytest
import ray
from ray.exceptions import AuthenticationError

from tla_service.cluster.session import CONNECT_SECONDS, ray_session
from tla_service.config import RunConfig
from tla_service.errors import UnavailableError


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
    with pytest.raises(UnavailableError) as caught, ray_session(run.scaling):
        pass
    assert caught.value.reason.startswith(reason)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "[::1]:6379", "ray://[::1]:6379"])
def test_an_address_is_tried_before_ray_is(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", connect := Mock())
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(socket, "create_connection", tried := Mock())
    with ray_session(RunConfig.model_validate({"scaling": {"address": address}}).scaling):
        pass
    tried.assert_called_once_with(("::1" if "::1" in address else "10.0.0.1", 6379), timeout=CONNECT_SECONDS)
    assert connect.call_args.kwargs["address"] == address


def test_a_folder_too_deep_for_rays_sockets_is_refused_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    started: list[object] = []
    monkeypatch.setattr(ray, "init", lambda *_, **options: started.append(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * 60)))
    with pytest.raises(UnavailableError) as caught, ray_session(RunConfig().scaling):
        pass
    assert str(caught.value).startswith(f"TMPDIR={tmp_path}/xxx")
    assert "at most 107 work; set RAY_TMPDIR to a short folder on a local disk, such as /tmp" in str(caught.value)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 60)))
    with pytest.raises(UnavailableError, match=r"^RAY_TMPDIR="), ray_session(RunConfig().scaling):
        pass
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAY_TMPDIR", "/dev/null/tmp")
    with pytest.raises(
        UnavailableError, match=r"^RAY_TMPDIR=/dev/null/tmp: Ray cannot write there \(not a directory\)"
    ):
        with ray_session(RunConfig().scaling):
            pass
    assert started == []
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    with ray_session(RunConfig().scaling):
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
