"""The output folder: whose it is, and what changing a setting that shapes no weights does to a run."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.config.test_identity import SHAPES_NOTHING, with_setting
from tests.training.conftest import digits_config
from tests.training.test_resume import LAST, NEWEST, records, train
from tla_service.config import ModelConfig, RunConfig
from tla_service.config.loading import CONFIG, find_output, load_settings, to_yaml
from tla_service.errors import ConfigError
from tla_service.models.own_code import pack
from tla_service.training.output import SUMMARY, open_output, write_config, write_summary

ROUNDING = {"speed.fold_batchnorm", "speed.fused_optimizer", "training.channels_last"}
NOT_HERE = {"speed.compile", "speed.cuda_graphs", "data.root", "data.download", "data.cache_dir", "model.code",
            "data.extra.path"}  # fmt: skip


def changed(config: RunConfig, name: str) -> RunConfig:
    return RunConfig.model_validate(with_setting(name, SHAPES_NOTHING[name], config.model_dump(mode="json")))


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has ended after two of its four epochs."""
    output = tmp_path_factory.mktemp("half")
    train(output, digits_config(), epochs=2)
    return output


@pytest.fixture
def half_done(halves: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(halves, tmp_path / "run"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole run."""
    output = tmp_path_factory.mktemp("undisturbed")
    train(output, digits_config())
    return output


def weights(output: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(output / "checkpoints" / LAST / "model.safetensors")


@pytest.mark.parametrize(
    ("names", "rounding"),
    [(SHAPES_NOTHING.keys() - NOT_HERE - ROUNDING, 0.0), (ROUNDING, 1e-5)],
    ids=["exact", "rounding"],
)
def test_a_run_resumes_with_other_values_of_what_shapes_nothing(
    undisturbed: Path, half_done: Path, names: Iterable[str], rounding: float
) -> None:
    config = digits_config()
    for name in names:
        config = changed(config, name)
    run = train(half_done, config)
    assert records(half_done, "start")[-1]["resumed_from"].endswith(NEWEST)
    assert len(run.state.history) == 4
    ours, theirs = weights(half_done), weights(undisturbed)
    for key in theirs:
        assert (ours[key].double() - theirs[key].double()).abs().max().item() <= rounding, key


def test_an_optimizer_that_is_no_longer_fused_is_not_fused(half_done: Path) -> None:
    run = train(half_done, changed(digits_config(), "speed.fused_optimizer"), epochs=0)
    assert run.state.step == 8
    assert [group["fused"] for group in run.state.optimizer.param_groups] == [False, False]


def test_a_folder_is_the_runs_whose_configuration_it_holds(tmp_path: Path) -> None:
    write_config(RunConfig(), tmp_path)
    assert open_output(changed(RunConfig(), "evaluation.batch_size"), tmp_path) is None
    with pytest.raises(ConfigError, match="holds a run with another configuration; choose another --output or --name"):
        open_output(RunConfig(seed=1), tmp_path)
    for other in (b"of another program: 1", b"\xff"):
        (tmp_path / CONFIG).write_bytes(other)
        with pytest.raises(ConfigError, match="holds a run with another configuration"):
            open_output(RunConfig(), tmp_path)


@pytest.mark.parametrize("summary", ["{}", "[1]", '{"stat', '{"status": "finished"}'])
def test_a_summary_of_another_program_does_not_answer_for_a_run(summary: str, tmp_path: Path) -> None:
    (tmp_path / SUMMARY).write_text(summary)
    with pytest.raises(ConfigError, match=r"holds a summary\.json that is not a run's.*; choose another --output"):
        open_output(RunConfig(), tmp_path)
    if "finished" not in summary:
        write_config(RunConfig(), tmp_path)
        with pytest.raises(ConfigError, match=r"its summary\.json is damaged; delete that file"):
            open_output(RunConfig(), tmp_path)


def test_a_folder_checkpoint_of_no_run_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(ConfigError, match=r"holds a checkpoint that is not a run's.*; choose another --output"):
        open_output(RunConfig(), tmp_path)
    write_config(RunConfig(), tmp_path)
    assert open_output(RunConfig(), tmp_path) is None


@pytest.mark.parametrize("name", ["evaluation.test", "data.test_limit", "data.root", "data.extra.path"])
def test_a_finished_run_does_not_answer_for_another_test_or_other_data(tmp_path: Path, name: str) -> None:
    config = RunConfig.model_validate({"data": {"extra": {"path": "/d.npz", "share": 0.5}}})
    write_config(config, tmp_path)
    (tmp_path / SUMMARY).write_text(json.dumps({"status": "finished", "clean_accuracy": 0.9}))
    assert open_output(changed(config, "evaluation.batch_size"), tmp_path) is not None
    with pytest.raises(ConfigError, match=rf"{name}: a run that has finished in .* had another {name}") as caught:
        open_output(changed(config, name), tmp_path)
    assert "evaluate its model with jobs/evaluate_tla.py" in str(caught.value)


def test_a_finished_run_does_not_answer_for_other_code(tmp_path: Path) -> None:
    own, output = tmp_path / "own", tmp_path / "run"
    for folder in (own, output):
        folder.mkdir()
    (own / "network.py").write_text("def build(): ...")
    (output / "code.zip").write_bytes(pack(str(own)))
    config = RunConfig(model=ModelConfig(name="network:build", code=str(own)))
    write_config(config, output)
    write_summary(output, {"status": "finished", "checkpoint": str(output)})
    assert open_output(config, output) is not None
    (own / "network.py").write_text("def build(): return 1")
    with pytest.raises(ConfigError, match=r"^model.code=.*: its files are not those of the run that has finished in"):
        open_output(config, output)


def test_a_run_begun_under_an_earlier_versions_name_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(["--preset", "digits"])
    new = tmp_path / "runs" / settings.run_config.run_name
    assert find_output(settings) == (settings.run_config, new)
    for name, config in (
        ("digits-tla-s0-00000000", load_settings(["--preset", "digits", "--loss.margin", "0.1"]).run_config),
        ("digits-tla-s0-0badcafe", settings.run_config),
        ("digits-tla-s0-my-copy", settings.run_config),
    ):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / CONFIG).write_text(to_yaml(config))
    damaged = tmp_path / "runs" / "digits-tla-s0-00000001"
    (damaged / CONFIG).mkdir(parents=True)  # cannot be read
    damaged.with_name("digits-tla-s0-00000002").mkdir()
    damaged.with_name("digits-tla-s0-00000002").joinpath(CONFIG).write_bytes(b"\xff")
    config, output = find_output(settings)
    assert (config.name, output) == ("digits-tla-s0-0badcafe", tmp_path / "runs" / "digits-tla-s0-0badcafe")
    # Not where a name or a folder is given, nor where the new name is there.
    for arguments in (["--name", "mine"], ["--output", "there"]):
        assert find_output(load_settings(["--preset", "digits", *arguments]))[0].run_name != "digits-tla-s0-0badcafe"
    new.mkdir()
    assert find_output(settings)[1] == new


def test_a_finished_run_answers_for_its_data_however_the_path_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for before, now in (("birds/", str(tmp_path / "birds")), ("s3://key:secret@bucket/x", "s3://key:secret@bucket/x")):
        write_config(RunConfig.model_validate({"data": {"root": before}}), tmp_path)
        (tmp_path / SUMMARY).write_text(json.dumps({"status": "finished"}))
        assert open_output(RunConfig.model_validate({"data": {"root": now}}), tmp_path) is not None
