"""The CUDA path on CPU tensors: what a GPU would wait for, and graphs that are replayed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.training.conftest import KeepingReporter, digits_config, fit, weights_of
from tests.training.emulation import EmulatedGraph, emulated_graphs, violations
from tla_service.config import RunConfig
from tla_service.config.loading import load_settings, preset_names
from tla_service.errors import ConfigError
from tla_service.runtime import WorkerContext
from tla_service.training.fit import Run
from tla_service.training.meter import Meter

__all__ = ["emulated_graphs"]
ALONE = WorkerContext()
NewReporter = Callable[..., KeepingReporter]
POOL = {"pool": "separate", "pool_size": 20, "positives": "both", "clean_noise": 0.05}
STEPS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in ("natural", "at", "alp", "tla", "tla_rn", "tla_sa")},
    "mart": {"method": "mart"},
    "TLA on TRADES": {"loss": {"robust_term": "trades"}},
    "separate pool": {"mining": POOL},
    "global scope": {"mining": {"scope": "global", "positives": "both", "keep_probability": 0.5}},
    "average, clipping, weight decay": {
        "training": {"ema_decay": 0.9},
        "optimizer": {"name": "sgd", "momentum": 0.9, "weight_decay": 1e-3, "grad_clip": 1.0},
    },
    "adversarial weights": {"attack": {"awp": True}, "training": {"ema_decay": 0.9}},
    "growing radius": {"attack": {"warmup": 0.8}},
    "L2": {"attack": {"norm": "l2", "epsilon": 1.0, "step_size": 0.4}},
    "n_fgsm": {"attack": {"kind": "n_fgsm"}},
    "free": {"attack": {"kind": "free", "free_replays": 2}},
    "BatchNorm in train mode": {"attack": {"batchnorm": "train"}, "model": {"name": "mnist_cnn"}},
    "roles apart": {"training": {"batchnorm_roles": "apart"}, "model": {"name": "mnist_cnn"}},
    "bfloat16": {"training": {"precision": "bfloat16", "global_batch_size": 10}, "model": {"name": "mnist_cnn"}},
    "channels_last": {"training": {"channels_last": True}, "mining": POOL, "model": {"name": "mnist_cnn"}},
    "augmentation": {"data": {"crop_padding": 1, "flip": True}},
}


def on_digits(name: str) -> RunConfig:
    """A preset on small images, with a small network and batch."""
    pretrained = ["--model.pretrained", "unused"] if name.startswith("finetune_") else []
    preset = load_settings(["--preset", name, "--data.root", "unused", *pretrained]).run_config
    kept = {"method", "loss", "mining", "attack", "optimizer", "schedule", "training", "speed"}
    sections = preset.model_dump(exclude_defaults=True, include=kept)
    sections["training"] = sections.get("training", {}) | {"epochs": 4, "global_batch_size": 50, "max_steps": None}
    sections["attack"] = sections.get("attack", {}) | {"num_steps": 2}
    if sections.get("mining", {}).get("pool") == "separate":
        sections["mining"] |= {"pool_size": 20}
    sections["data"] = {"augment": preset.data.augment}
    # The weights are not read here; without them, the settings of fine-tuning are refused.
    return digits_config(**sections, model={"name": "digits_cnn"} | ({"pretrained": "unused"} if pretrained else {}))


def check_update(config: RunConfig, reporter: KeepingReporter) -> None:
    run = Run(config, ALONE, reporter)
    run.start(None)
    run.meter = Meter(ALONE)
    batches = run.batches.epoch(0)
    first, second = next(batches), next(batches)
    run._update(first)  # allocates the optimizer's state

    def update() -> None:
        run.meter.add(run._update(second))

    hosts = [] if run.state.average is None else [run.state.average.n_averaged]
    assert violations(update, channels_last=config.training.channels_last, hosts=hosts) == []


@pytest.mark.parametrize("changes", STEPS.values(), ids=STEPS.keys())
def test_an_update_never_waits_for_the_device(reporter: KeepingReporter, changes: dict[str, Any]) -> None:
    check_update(digits_config(**changes), reporter)


@pytest.mark.parametrize("name", preset_names())
def test_nor_does_one_of_a_preset(reporter: KeepingReporter, name: str) -> None:
    check_update(on_digits(name), reporter)


def test_the_rules_see_what_they_are_there_to_see() -> None:
    weights, labels = torch.rand(8, 8), torch.arange(8)
    image, kernel = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3)
    cases: dict[str, Callable[[], object]] = {
        "waits": lambda: float(weights.sum()),
        "with a mask waits": lambda: weights[labels > 3],
        "mixes a tensor of the host": lambda: weights + torch.ones(8),
        "not in channels_last": lambda: torch.nn.functional.conv2d(image, kernel),
    }
    for expected, call in cases.items():
        found = violations(call, channels_last=True)
        assert any(expected in line for line in found), (expected, found)
    harmless = violations(lambda: weights.add_(torch.ones(8, device=weights.device)).mul_(torch.tensor(2.0)))
    assert harmless == []


GRAPHED: dict[str, dict[str, Any]] = {
    "ragged batches": {},
    "average and a growing radius": {"training": {"ema_decay": 0.9}, "attack": {"warmup": 0.8}},
    "adversarial weights, BatchNorm": {"attack": {"awp": True}, "model": {"name": "mnist_cnn"}},
    "embeddings of the last step": {"mining": {"pool": "separate", "pool_size": 20, "queries": "last_step"}},
    "bfloat16": {"training": {"precision": "bfloat16"}},
    "L2": {"attack": {"norm": "l2", "epsilon": 1.0, "step_size": 0.4, "warmup": 0.5}},
    "KL": {"loss": {"robust_term": "trades"}},
}


@pytest.mark.parametrize("changes", GRAPHED.values(), ids=GRAPHED.keys())
def test_graphs_train_the_same_weights(
    new_reporter: NewReporter, emulated_graphs: type[EmulatedGraph], changes: dict[str, Any]
) -> None:
    data = {"train_limit": 190}
    sections = {**changes, "data": data, "training": {"epochs": 1, **changes.get("training", {})}}
    weights = []
    for graphs in (False, True):
        reporter = new_reporter()
        fit(digits_config(**sections, speed={"cuda_graphs": graphs}), ALONE, reporter)
        weights.append(weights_of(reporter.checkpoints[-1]))
    assert weights[0] == weights[1]
    run = Run(digits_config(**sections), ALONE, new_reporter())
    assert len(run.batches.sizes) == 2
    assert len(emulated_graphs.captured) == 2
    assert len(emulated_graphs.replays) == 2 + run.total_steps  # each is compared with eager execution once


def test_all_graphs_are_captured_before_the_first_step(
    reporter: KeepingReporter, emulated_graphs: type[EmulatedGraph]
) -> None:
    run = Run(digits_config(data={"train_limit": 190}, speed={"cuda_graphs": True}), ALONE, reporter)
    run.start(None)
    assert len(emulated_graphs.captured) == len(run.batches.sizes) == 2
    assert emulated_graphs.replays == emulated_graphs.captured  # compared with eager execution
    assert run.step.adversary.uses_graphs
    assert reporter.records[-1]["message"] == "training on 1 worker, cuda_graphs"


@pytest.mark.parametrize("flaw", ["not captured", "another result"])
def test_graphs_that_do_not_compute_the_same_are_not_used(
    new_reporter: NewReporter,
    emulated_graphs: type[EmulatedGraph],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    flaw: str,
) -> None:
    plain, fallen_back = new_reporter(), new_reporter()
    fit(digits_config(), ALONE, plain)
    if flaw == "not captured":

        def capture(*_: Any, **__: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(torch.cuda, "graph", capture)
    else:
        monkeypatch.setattr(EmulatedGraph, "replay", lambda _: None)
        monkeypatch.setattr("tla_service.training.cuda_graph.climb", lambda _, images, *__: images * 0)
    fit(digits_config(speed={"cuda_graphs": True}), ALONE, fallen_back)
    assert caplog.messages[0].startswith("The attack runs without CUDA graphs: ")
    assert fallen_back.records[0]["speed"]["cuda_graphs"] is False
    assert weights_of(fallen_back.checkpoints[-1]) == weights_of(plain.checkpoints[-1])


FAST = {"channels_last": True, "cuda_graphs": True}
SLOW = {"channels_last": False, "cuda_graphs": False}


@pytest.mark.parametrize(
    ("changes", "on_gpu"),
    [
        ({}, FAST),
        ({"speed": {"mode": "exact"}}, SLOW),
        ({"method": "natural"}, FAST | {"cuda_graphs": False}),
        ({"attack": {"kind": "n_fgsm"}}, FAST | {"cuda_graphs": False}),
        ({"attack": {"kind": "my_attacks:own"}}, SLOW),
        ({"attack": {"batchnorm": "train"}}, FAST | {"cuda_graphs": False}),
        ({"model": {"name": "my_network:factory"}}, SLOW),
        ({"model": {"name": "timm:resnet18"}}, FAST | {"cuda_graphs": False}),
        ({"model": {"name": "torchvision:resnet18"}}, FAST),
        ({"speed": {"cuda_graphs": False}, "training": {"channels_last": False}}, SLOW),
        ({"speed": {"mode": "exact", "cuda_graphs": True}}, SLOW | {"cuda_graphs": True}),
        ({"speed": {"mode": "exact"}, "training": {"channels_last": True}}, FAST | {"cuda_graphs": False}),
    ],
    ids=str,
)
def test_what_is_left_open_is_decided_by_mode_and_device(changes: dict[str, Any], on_gpu: dict[str, bool]) -> None:
    config = digits_config(**changes)
    for has_gpu, expected in ((True, on_gpu), (False, None)):
        run = config.on_device(has_gpu=has_gpu)
        found = {"channels_last": run.training.channels_last, "cuda_graphs": run.speed.cuda_graphs}
        given = {"channels_last": config.training.channels_last, "cuda_graphs": config.speed.cuda_graphs}
        assert found == (expected or {name: bool(value) for name, value in given.items()})
        # Neither rounding nor what is measured by default changes: bfloat16 and compilation are asked for.
        assert (run.training.precision, run.speed.compile, run.speed.tune_kernels) == ("float32", "none", False)
        assert run.digest == config.digest
        assert run.on_device(has_gpu=not has_gpu) == run


def test_a_run_on_a_cpu_computes_what_it_did_and_its_checkpoint_leaves_the_device_open(
    reporter: KeepingReporter,
) -> None:
    fit(digits_config(training={"epochs": 1}), ALONE, reporter)
    assert reporter.records[0]["speed"] == SLOW | {"compile": "none", "precision": "float32"}
    assert "channels_last: null" in (reporter.checkpoints[-1] / "config.yaml").read_text()


def test_exact_convolutions_do_not_use_tf32(monkeypatch: pytest.MonkeyPatch, reporter: KeepingReporter) -> None:
    for mode, allowed in (("auto", True), ("exact", False)):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
        Run(digits_config(speed={"mode": mode}), ALONE, reporter).start(None)
        assert torch.backends.cudnn.allow_tf32 is allowed


@pytest.mark.parametrize("changes", GRAPHED.values(), ids=GRAPHED.keys())
def test_an_update_with_the_values_of_a_gpu_does_not_wait(
    reporter: KeepingReporter, emulated_graphs: type[EmulatedGraph], changes: dict[str, Any]
) -> None:
    check_update(digits_config(**changes).on_device(has_gpu=True), reporter)
    assert emulated_graphs.captured


def test_graphs_without_a_gpu_are_refused_with_a_sentence(reporter: KeepingReporter) -> None:
    with pytest.raises(ConfigError, match=r"^speed\.cuda_graphs=True: CUDA graphs need a GPU, .*; leave it out"):
        fit(digits_config(speed={"cuda_graphs": True}), ALONE, reporter)
