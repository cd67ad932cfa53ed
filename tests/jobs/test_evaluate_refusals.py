"""What users of the evaluation job can get wrong: one message each, also where Ray does not start, and nothing lost."""

import json
from pathlib import Path
from zlib import crc32

import torch
from safetensors.torch import save_file

from tests.jobs.conftest import Run
from tla_service.config import RunConfig
from tla_service.config.loading import to_yaml
from tla_service.files import locked_folder
from tla_service.models import build_model

JOB = "evaluate_tla"


def checkpoint(
    folder: Path,
    classes: int = 10,
    shape: tuple[int, int, int] = (1, 8, 8),
    spoil: bool = False,
    names: list[str] | None = None,
) -> str:
    """Random weights as training leaves them."""
    folder.mkdir()
    config = RunConfig()
    torch.manual_seed(crc32(folder.name.encode()))
    network = build_model(config.model.name, classes, shape)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    if spoil:
        next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, folder / "best.safetensors")
    (folder / "config.yaml").write_text(to_yaml(config))
    names = names or [str(number) for number in range(classes)]
    (folder / "data.json").write_text(json.dumps({"class_names": names, "image_shape": shape, "fingerprint": "f"}))
    return str(folder)


def test_models_that_do_not_fit(run_in_process: Run, tmp_path: Path) -> None:
    good = checkpoint(tmp_path / "good")
    cases = [
        (["--model", checkpoint(tmp_path / "wide", shape=(1, 12, 12))], "takes 1x12x12 images, digits has 1x8x8"),
        (["--model", checkpoint(tmp_path / "few", classes=4)], "knows 4 classes, digits has 10"),
        (["--model", checkpoint(tmp_path / "broken", spoil=True)], "logits that are not finite"),
        (["--model", good, "--compare", checkpoint(tmp_path / "lacks", classes=9)], "compare="),
        (["--model", good, "--compare", good], "named twice"),
        (
            ["--model", checkpoint(tmp_path / "turned", names=list("0123456798"))],
            "its class '9' is number 8, in digits it is number 9; evaluate it on data with the classes in its order",
        ),
        (["--model", good, "--surrogate", good], "surrogate="),
    ]
    for arguments, said in cases:
        code, message = run_in_process(*arguments)
        assert code == 2, message
        assert said in message
        assert message.count("\n") == 1
        assert "Traceback" not in message


def test_models_that_are_not_there(run_in_process: Run, tmp_path: Path) -> None:
    for address in ("nowhere", "models:/nothing/1", "runs:/0123/model"):
        code, message = run_in_process("--model", address)
        assert (code, message.count("\n")) == (3, 1), message
        assert message.startswith(f"error: model={address}")
    code, message = run_in_process("--model", "models:nothing")
    assert code == 2
    assert "models:/NAME/VERSION" in message


def test_attacks_that_cannot_be(run_in_process: Run, tmp_path: Path) -> None:
    good = checkpoint(tmp_path / "good")
    for arguments, said in [
        (["--epsilon", "0"], "epsilon"),
        (["--attacks", '{"a": {"kind": "jsma"}}'], "fgsm, bim, pgd, mim, cw"),
        (["--attacks", '{"a": {"kind": "fgsm"}}'], "none of them is PGD"),
        # Curves and audit must not rest on an attack of another radius.
        (["--attacks", '{"a": {"epsilon": 0.001, "step_size": 0.001}}'], "none of them is PGD with norm linf"),
        (["--data.test_limit", "100", "--images.autoattack", "1"], "all of which are set aside for the promotion gate"),
    ]:
        code, message = run_in_process("--model", good, *arguments)
        assert code == 2, message
        assert said in message


def test_an_evaluation_that_another_process_is_making_is_refused(run_in_process: Run, tmp_path: Path) -> None:
    with locked_folder(tmp_path / "report", "output"):
        code, message = run_in_process("--model", checkpoint(tmp_path / "good"), "--output", str(tmp_path / "report"))
    assert code == 2
    assert message.startswith(f"error: output={tmp_path}/report: in use by process ")
    assert not (tmp_path / "report" / "evaluation.json").exists()


def test_a_folder_that_holds_something_else_is_left_alone(run_in_process: Run, tmp_path: Path) -> None:
    good = checkpoint(tmp_path / "good")
    output = tmp_path / "report"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    code, message = run_in_process("--model", good, "--output", str(output))
    assert code == 2
    assert "holds other files" in message
    assert [path.name for path in output.iterdir()] == ["thesis.tex"]
    (output / "thesis.tex").unlink()
    (output / "evaluation.json").write_text('{"settings": "another"}')
    (output / "report.html").write_text("an earlier report")
    code, message = run_in_process("--model", good, "--output", str(output))
    assert code == 2
    assert "differs in weights, data, threat model, settings" in message
    assert (output / "report.html").read_text() == "an earlier report"
