"""The relatives of a registered version come from what its run keeps."""

from pathlib import Path

import pytest
import torch
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from safetensors.torch import save_file

from tests.registry.evaluations import register_another
from tests.registry.tracking_server import Packaged
from tla_service.config.loading import to_yaml
from tla_service.errors import UnavailableError
from tla_service.models import build_model
from tla_service.registry import subject as subject_module
from tla_service.registry.subject import load_subject
from tla_service.report.relatives import Kin, find_relatives
from tla_service.tracking.connection import client
from tla_service.tracking.runs import log_files


def kin_of(packaged: Packaged) -> dict[str, Kin]:
    def load(uri: str, field: str) -> "object":
        return load_subject(uri, field, packaged.uri)

    subject = load_subject("models:/tla-digits/1", "model", packaged.uri)
    return {kin.source: kin for kin in find_relatives(subject, load)}  # type: ignore[arg-type]


def test_the_last_epoch_of_a_version_is_among_the_artifacts_of_its_run(packaged: Packaged, tmp_path: Path) -> None:
    assert f"its run {packaged.run_id} keeps no checkpoint/model.safetensors" in kin_of(packaged)["last"].why
    torch.manual_seed(7)
    last = build_model("digits_cnn", 10, (1, 8, 8)).state_dict()
    save_file(last, tmp_path / "model.safetensors")
    log_files(packaged.uri, packaged.run_id, {"checkpoint/model.safetensors": tmp_path / "model.safetensors"})
    network = kin_of(packaged)["last"].network
    assert network is not None
    assert all(torch.equal(value, last[name]) for name, value in network.state_dict().items())


def test_the_checkpoint_of_a_run_is_a_model_too(packaged: Packaged, tmp_path: Path) -> None:
    save_file(packaged.network.state_dict(), tmp_path / "best.safetensors")
    (tmp_path / "config.yaml").write_text(to_yaml(packaged.config))
    (tmp_path / "data.json").write_text(
        '{"class_names": ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"], "image_shape": [1, 8, 8]}'
    )
    names = ("best.safetensors", "config.yaml", "data.json")
    log_files(packaged.uri, packaged.run_id, {f"checkpoint/{name}": tmp_path / name for name in names})
    subject = load_subject(f"runs:/{packaged.run_id}/checkpoint", "model", packaged.uri)
    assert subject.facts.uri == f"runs:/{packaged.run_id}/checkpoint"
    assert subject.config == packaged.config
    with pytest.raises(UnavailableError, match=r"compare=.*/nothing: .*"):
        load_subject(f"runs:/{packaged.run_id}/nothing", "compare", packaged.uri)


def test_a_lost_response_is_no_missing_file(packaged: Packaged, monkeypatch: pytest.MonkeyPatch) -> None:
    download, lost = LocalArtifactRepository._download_file, []

    def lose_the_first(self: LocalArtifactRepository, remote_file_path: str, local_path: str) -> None:
        if remote_file_path == "config.yaml" and not lost:
            lost.append(remote_file_path)
            raise ConnectionError("reset by peer")
        download(self, remote_file_path, local_path)

    monkeypatch.setattr(LocalArtifactRepository, "_download_file", lose_the_first)
    assert load_subject("models:/tla-digits/1", "model", packaged.uri).config is not None
    assert lost


def test_an_alias_that_moves_meanwhile_does_not_change_the_version(
    packaged: Packaged, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, load = client(packaged.uri), subject_module.fetch_package
    made.set_registered_model_alias("tla-digits", "champion", "1")
    second = register_another(packaged)

    def load_and_move(*arguments: str) -> object:
        found = load(*arguments)
        made.set_registered_model_alias("tla-digits", "champion", second)
        return found

    monkeypatch.setattr(subject_module, "fetch_package", load_and_move)
    facts = load_subject("models:/tla-digits@champion", "model", packaged.uri).facts
    assert (facts.uri, facts.name, facts.version) == ("models:/tla-digits@champion", "tla-digits", "1")
