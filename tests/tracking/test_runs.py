"""A run in MLflow: complete, one for each key, and closed with its status."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import mlflow.artifacts
import pytest
import yaml
from mlflow import MlflowClient

from tests.registry.tracking_server import TrackingServer, config_for
from tla_service.config import RunConfig
from tla_service.errors import UnavailableError
from tla_service.tracking import runs as tracking_module
from tla_service.tracking.runs import finish_run, log_files, open_run, run_page, start_system_metrics

FACTS = {"data_fingerprint": "0123456789abcdef" * 4, "train_images": "1438"}


def text_of(uri: str, run_id: str, name: str) -> str:
    artifacts = MlflowClient(uri).get_run(run_id).info.artifact_uri
    return Path(mlflow.artifacts.download_artifacts(f"{artifacts}/{name}", tracking_uri=uri)).read_text()


def test_run_holds_every_field_and_the_configuration_loads_again(local_uri: str) -> None:
    config = config_for(
        local_uri,
        method="tla_rn",
        seed=3,
        attack={"epsilon": "8/255"},
        schedule={"name": "piecewise", "milestones": [3, 5]},
        tracking={"uri": local_uri, "tags": {"team": "vision"}},
    )
    run_id = open_run(config, "it's a key", facts=FACTS)
    run = MlflowClient(local_uri).get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.info.run_name == config.run_name

    leaves = {}

    def walk(fields: dict[str, object], prefix: str) -> None:
        for name, value in fields.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{name}.")
            else:
                leaves[prefix + name] = value

    walk(config.model_dump(mode="json"), "")
    shown = {
        name: value if isinstance(leaves[name], str) else json.loads(value) for name, value in run.data.params.items()
    }
    assert shown == leaves
    assert run.data.params["attack.epsilon"] == str(8 / 255)
    assert run.data.params["schedule.milestones"] == "[3, 5]"

    assert RunConfig.model_validate(yaml.safe_load(text_of(local_uri, run_id, "config.yaml"))) == config
    assert run.data.tags["team"] == "vision"
    assert run.data.tags["tla.run_key"] == "it's a key"
    assert run.data.tags["tla.version"]
    assert run.data.tags["tla.train_images"] == "1438"
    assert run.inputs.dataset_inputs[0].dataset.name == "digits"
    assert run.inputs.dataset_inputs[0].dataset.digest == FACTS["data_fingerprint"][:36]
    environment = json.loads(text_of(local_uri, run_id, "environment.json"))
    assert environment["packages"]["mlflow"] == mlflow.__version__
    assert environment["torch"]


def test_same_key_continues_the_run_and_another_does_not(local_uri: str) -> None:
    config = config_for(local_uri)
    first = open_run(config, "a", facts=FACTS)
    finish_run(local_uri, first, "FAILED")
    client = MlflowClient(local_uri)
    assert client.get_run(first).info.status == "FAILED"

    more_workers = config_for(local_uri, scaling={"num_workers": 4})
    for count in ("1", "2"):
        assert open_run(more_workers, "a", facts=FACTS) == first
        run = client.get_run(first)
        assert (run.info.status, run.data.tags["tla.resumed"]) == ("RUNNING", count)
    assert run.data.params["scaling.num_workers"] == "auto"
    assert yaml.safe_load(text_of(local_uri, first, "config-resumed-1.yaml"))["scaling"]["num_workers"] == 4
    assert yaml.safe_load(text_of(local_uri, first, "config.yaml"))["scaling"]["num_workers"] == "auto"

    child = open_run(config, "b", facts=FACTS, parent_run_id=first)
    assert child != first
    assert client.get_run(child).data.tags["mlflow.parentRunId"] == first


def test_parameters_are_those_of_the_workers_and_the_file_is_that_of_any(local_uri: str) -> None:
    config = config_for(local_uri)
    for use_gpu in (True, False):
        run_id = open_run(config, f"gpu {use_gpu}", facts=FACTS, use_gpu=use_gpu)
        params = MlflowClient(local_uri).get_run(run_id).data.params
        assert params["training.channels_last"] == params["speed.cuda_graphs"] == str(use_gpu).lower()
        assert RunConfig.model_validate(yaml.safe_load(text_of(local_uri, run_id, "config.yaml"))) == config


def test_run_that_was_left_half_described_is_completed(local_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    config = config_for(local_uri)
    with monkeypatch.context() as patched:
        patched.setattr(tracking_module, "_describe", crash)
        with pytest.raises(KeyboardInterrupt):
            open_run(config, "half", facts=FACTS)
    run_id = open_run(config, "half", facts=FACTS)
    run = MlflowClient(local_uri).get_run(run_id)
    assert run.data.params["loss.margin"] == "0.05"
    assert "tla.resumed" not in run.data.tags
    assert RunConfig.model_validate(yaml.safe_load(text_of(local_uri, run_id, "config.yaml"))) == config


def test_a_run_whose_creation_was_not_confirmed_is_found_and_not_resumed(
    local_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create, lost = MlflowClient.create_run, list[str]()

    def lose_the_first(*arguments: Any, **options: Any) -> Any:
        run = create(*arguments, **options)
        if not lost:
            lost.append(run.info.run_id)
            raise ConnectionError("reset by peer")
        return run

    monkeypatch.setattr(MlflowClient, "create_run", lose_the_first)
    monkeypatch.setattr("tla_service.errors.time.sleep", lambda _: None)
    assert [open_run(config_for(local_uri), "lost", facts=FACTS)] == lost
    assert "tla.resumed" not in MlflowClient(local_uri).get_run(lost[0]).data.tags
    assert json.loads(text_of(local_uri, lost[0], "environment.json"))["torch"]


def test_a_run_that_is_deleted_meanwhile_is_named_with_what_restores_it(local_uri: str) -> None:
    run_id = open_run(config_for(local_uri), "run", facts={})
    MlflowClient(local_uri).delete_run(run_id)
    with pytest.raises(UnavailableError, match=rf"is deleted.*again.*mlflow runs restore --run-id {run_id}"):
        finish_run(local_uri, run_id)


def test_files_are_stored_in_the_folders_asked_for(server: TrackingServer, tmp_path: Path) -> None:
    run_id = open_run(config_for(server.uri), "files", facts={})
    source = tmp_path / "local-name.txt"
    source.write_text("content")
    log_files(server.uri, run_id, {"plots/local-name.txt": source, "local-name.txt": source})
    assert text_of(server.uri, run_id, "plots/local-name.txt") == "content"
    assert text_of(server.uri, run_id, "local-name.txt") == "content"


@pytest.mark.slow
def test_results_wait_for_a_server_that_is_away_for_longer_than_a_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = TrackingServer(tmp_path)
    server.start()
    try:
        run_id = open_run(config_for(server.uri), "key", facts={})
        server.kill()
        (tmp_path / "file").write_text("hours of work")
        back = threading.Timer(20, server.start)
        back.start()
        log_files(server.uri, run_id, {"file": tmp_path / "file"})
        finish_run(server.uri, run_id)
        back.join()
        client = MlflowClient(server.uri)
        assert [artifact.path for artifact in client.list_artifacts(run_id) if artifact.path == "file"]
        assert client.get_run(run_id).info.status == "FINISHED"
        assert "Storing file failed" in caplog.text
    finally:
        server.kill()


def test_system_metrics_arrive(
    local_uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking_module, "_SYSTEM_METRICS_SECONDS", 0.1)
    run_id = open_run(config_for(local_uri), "system", facts={})
    stop = start_system_metrics(local_uri, run_id)
    deadline = time.monotonic() + 20
    client = MlflowClient(local_uri)
    while not (found := client.get_run(run_id).data.metrics) and time.monotonic() < deadline:
        time.sleep(0.1)
    stop()
    assert "system/cpu_utilization_percentage" in found
    assert not caplog.records


def test_a_run_stores_no_credentials(server: TrackingServer) -> None:
    uri = server.uri.replace("://", "://me:hunter2@")
    config = config_for(uri, tracking={"uri": uri, "tags": {"hook": "https://me:hunter2@h/x"}})
    run_id = open_run(config, "secret", facts={})
    run = MlflowClient(server.uri).get_run(run_id)
    assert run.data.tags["hook"] == "https://h/x"
    assert run.data.params["tracking.uri"] == server.uri
    text = text_of(server.uri, run_id, "config.yaml")
    assert server.uri in text
    assert "hunter2" not in text
    assert run_page(uri, run_id) == f"{server.uri}/#/experiments/{run.info.experiment_id}/runs/{run_id}"
    assert open_run(config, "secret", facts={}) == run_id
    files = {artifact.path for artifact in MlflowClient(server.uri).list_artifacts(run_id)}
    assert "config-resumed-1.yaml" not in files, "the configuration is the same"


def test_a_local_run_page_shows_no_credentials() -> None:
    page = run_page("postgresql://me:hunter2@host/mlflow", "1a")
    assert page == "run 1a, shown by: mlflow ui --backend-store-uri postgresql://host/mlflow"
