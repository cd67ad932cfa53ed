"""What makes two runs the same: every setting is classified, and what shapes no weights is no part of it."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.config.test_run import LEAVES
from tla_service.config import RunConfig
from tla_service.config.loading import same_run, to_yaml

# A value other than the default for each setting that shapes the weights or chooses the best; where it needs company,
# the other settings go with it.
SHAPES: dict[str, Any] = {
    "method": "tla_sa",
    "seed": 1,
    "data.name": ("mnist", {"data.root": "/d"}),
    "data.label_column": "y",
    "data.image_column": "x",
    "data.train": "Training",
    "data.test": "Testing",
    "data.validation_fraction": 0.2,
    "data.test_fraction": 0.2,
    "data.train_limit": 100,
    "data.image_size": 16,
    "data.balance": "sampling",
    "data.extra.share": (0.5, {"data.extra.path": "/e.npz"}),
    "data.extra.duplicates": "drop",
    "data.crop_padding": 1,
    "data.flip": True,
    "data.saturation": 1.5,
    "data.augment": "autoaugment",
    "data.cutmix": (True, {"method": "at"}),
    "model.name": "small_cnn",
    "model.normalization": "none",
    "model.activation": "silu",
    "model.embedding": "hidden",
    "model.pretrained": "/w",
    "model.head": ("new", {"model.pretrained": "/w"}),
    "attack.norm": ("l2", {"attack.epsilon": 0.6, "attack.step_size": 0.15}),
    "attack.epsilon": 0.05,
    "attack.step_size": 0.005,
    "attack.num_steps": 8,
    "attack.warmup": 0.5,
    "attack.random_start": False,
    "attack.kind": "n_fgsm",
    "attack.noise": 1.0,
    "attack.free_replays": 4,
    "attack.on_collapse": "ignore",
    "attack.collapse_drop": 0.4,
    "attack.objective": "kl",
    "attack.awp": True,
    "attack.awp_gamma": 0.01,
    "attack.batchnorm": "train",
    "attack.label_smoothing": False,
    "loss.robust_term": "trades",
    "loss.view_weight": (0.5, {"data.augment": "autoaugment", "training.batchnorm_roles": "apart"}),
    "loss.robust_weight": (3.0, {"loss.robust_term": "trades"}),
    "loss.triplet_weight": 1.0,
    "loss.norm_weight": 0.01,
    "loss.margin": 0.06,
    "loss.triplet_layer": "logits",
    "loss.norm_form": "mean_squares",
    "loss.own_margin_scale": 2.0,
    "loss.reduction": "sum",
    "loss.label_smoothing": 0.1,
    "loss.clean_weight": 0.5,
    "loss.logit_pairing_weight": 0.4,
    "loss.embedding_match_weight": 0.1,
    "loss.extra": {"my_losses:function": 0.5},
    "mining.pool": "separate",
    "mining.pool_size": 400,
    "mining.scope": "global",
    "mining.positives": "both",
    "mining.queries": "last_step",
    "mining.miner": "my_mining:function",
    "mining.similarity": "cosine",
    "mining.random_negatives": "any",
    "mining.keep_probability": 0.5,
    "mining.augment_pool": False,
    "mining.clean_noise": 0.1,
    "mining.clean_noise_on": "all",
    "mining.clean_noise_round": True,
    "optimizer.name": "adam",
    "optimizer.learning_rate": 0.2,
    "optimizer.body_rate": (0.1, {"model.pretrained": "/w"}),
    "optimizer.momentum": 0.8,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 1e-4,
    "optimizer.decay": "all",
    "optimizer.grad_clip": 1.0,
    "schedule.name": "cosine",
    "schedule.milestones": (5,),
    "schedule.unit": "step",
    "schedule.factor": 0.2,
    "schedule.warmup": 1.0,
    "schedule.peak": 0.3,
    "training.epochs": 11,
    "training.max_steps": 5,
    "training.global_batch_size": 64,
    "training.precision": "bfloat16",
    "training.ema_decay": 0.9,
    "training.batchnorm_roles": "apart",
    "training.freeze_batchnorm": (True, {"model.pretrained": "/w"}),
    "evaluation.validation.kind": "cw",
    "evaluation.validation.norm": (
        "l2",
        {"evaluation.validation.epsilon": 0.5, "evaluation.validation.step_size": 0.1},
    ),
    "evaluation.validation.epsilon": 0.05,
    "evaluation.validation.step_size": 0.001,
    "evaluation.validation.num_steps": 30,
    "evaluation.validation.num_restarts": 2,
    "evaluation.validation_limit": 50,
    "evaluation.validation_margin": True,
    "evaluation.every_epochs": 2,
}
SHAPES_NOTHING: dict[str, Any] = {
    "name": "mine",
    "data.root": "/d",
    "data.download": True,
    "data.cache_dir": "/c",
    "data.test_limit": 100,
    "data.validation": "",  # a checkpoint tells its validation images from others by their content
    "data.extra.path": ("/e.npz", {"data.extra.path": "/d.npz", "data.extra.share": 0.5}),
    "data.residency": "stream",
    "data.loader_workers": 0,
    "model.code": ("/c", {"model.name": "network:build"}),  # its contents do: checkpoints have their SHA-256
    "training.channels_last": True,
    "training.log_every_steps": 7,
    "training.checkpoint_minutes": 3,
    "speed.mode": "exact",
    "speed.fold_batchnorm": False,
    "speed.compile": "attack",
    "speed.cuda_graphs": True,
    "speed.keep_freed_memory": False,
    "speed.fused_optimizer": False,
    "speed.overlap_reduction": False,
    "speed.tune_kernels": True,
    "evaluation.test": {"fgsm": {"kind": "fgsm"}},
    "evaluation.batch_size": 100,
    "detection.covariance": "full",
    "detection.false_rejection_rate": 0.1,
    "detection.training_limit": 100,
    "scaling.num_workers": 4,
    "scaling.use_gpu": False,
    "scaling.cpus_per_worker": 2.0,
    "scaling.gpus_per_worker": 0.5,
    "scaling.max_failures": 0,
    "scaling.hang_seconds": 60.0,
    "scaling.async_validation": True,
    "scaling.storage": "/s",
    "scaling.wait_seconds": 9.0,
    "scaling.address": "auto",
    "tracking.uri": "http://server",
    "tracking.experiment": "other",
    "tracking.registered_model": "x",
    "tracking.tags": {"a": "b"},
}


def with_setting(name: str, value: Any, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """Fields of a run with one setting changed, and what it needs beside it."""
    value, others = value if isinstance(value, tuple) and isinstance(value[-1], dict) else (value, {})
    fields = {} if base is None else base
    for dotted, each in {**others, name: value}.items():
        *path, last = dotted.split(".")
        section = fields
        for part in path:
            section = section.setdefault(part, {})
        section[last] = each
    return fields


def test_every_setting_is_classified() -> None:
    assert not SHAPES.keys() & SHAPES_NOTHING.keys()
    assert SHAPES.keys() | SHAPES_NOTHING.keys() == LEAVES.keys()


@pytest.mark.parametrize("name", SHAPES)
def test_what_shapes_the_weights_makes_another_run(name: str) -> None:
    value = SHAPES[name]
    company = value[1] if isinstance(value, tuple) and isinstance(value[-1], dict) else {}
    alone: dict[str, Any] = {}
    for other, each in company.items():
        with_setting(other, each, alone)
    changed = RunConfig.model_validate(with_setting(name, value))
    try:
        before = RunConfig.model_validate(alone)
    except ValueError:  # the company makes no sense without the setting
        before = RunConfig()
    assert changed.digest != before.digest
    assert not same_run(to_yaml(before), changed)


@pytest.mark.parametrize("name", SHAPES_NOTHING)
def test_what_shapes_nothing_leaves_the_run_the_same(name: str) -> None:
    value = SHAPES_NOTHING[name]
    company: dict[str, Any] = {}
    for other, each in (value[1] if isinstance(value, tuple) else {}).items():
        with_setting(other, each, company)
    before = RunConfig.model_validate(company)
    changed = RunConfig.model_validate(with_setting(name, value))
    assert changed != before
    assert changed.digest == before.digest
    assert same_run(to_yaml(before), changed)


def test_a_setting_that_a_later_version_adds_changes_no_digest() -> None:
    class Later(RunConfig):
        added: int = 3

    plain, other = {"loss": {"margin": 0.1}}, {"loss": {"margin": 0.1}, "added": 4}
    assert Later.model_validate(plain).digest == RunConfig.model_validate(plain).digest
    assert Later.model_validate(other).digest != Later.model_validate(plain).digest


def test_a_run_that_began_with_model_weights_is_the_same_run() -> None:
    """The name of model.pretrained in earlier versions, and the digest that they gave to this run."""
    config = RunConfig.model_validate({"model": {"pretrained": "/w"}})
    assert config.digest == "d3730dad"
    assert RunConfig.model_validate({"model": {"weights": "/w"}}) == config
    assert same_run("model: {name: digits_cnn, normalization: default, weights: /w}", config)
    assert same_run("model: {weights: null}", RunConfig())


def test_a_file_that_holds_no_run_is_not_this_run(tmp_path: Path) -> None:
    for text in ("", "- 1", "a: [", "loss: {margn: 1}"):
        assert not same_run(text, RunConfig())
    assert re.fullmatch("[0-9a-f]{8}", RunConfig().digest)
