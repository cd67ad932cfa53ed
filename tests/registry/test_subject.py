"""The relatives of a registered version come from what its run keeps."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.registry.tracking_server import Packaged
from tla_service.models import build_model
from tla_service.registry.subject import load_subject
from tla_service.report.relatives import Kin, find_relatives
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
