"""Functions from outside the package: the examples of docs/extending.md, what a run does with them, and refusals."""

import pickle
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.conftest import KeepingReporter, digits_config, fit, loss_of, random_batch, weights_of
from tests.training.test_step import network
from tla_service.api import evaluate
from tla_service.attacks import Attack, attack_images, craft
from tla_service.config import RunConfig
from tla_service.config.loading import load_config
from tla_service.errors import ConfigError, UnavailableError, UserError
from tla_service.models.own_code import load_function, pack
from tla_service.runtime import WorkerContext
from tla_service.training.fit import Run
from tla_service.training.local import train
from tla_service.training.step import TOTALS, TrainingStep

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
EXAMPLES = dict(re.findall(r"^```python\n# own/(\S+)\n(.*?)^```", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL))
THREE: dict[str, Any] = {
    "attack": {"kind": "my_attacks:random_squares"},
    "loss": {"extra": {"my_losses:agreement": 0.5}},
    "mining": {"miner": "my_mining:one_of_two_hardest"},
}
CPU = torch.device("cpu")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """The page's examples can be imported; calling it adds a module."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def write(name: str, text: str) -> None:
        (folder / name).write_text(text)

    for name, text in EXAMPLES.items():
        write(name, text)
    yield write
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_the_examples_are_short() -> None:
    assert sorted(EXAMPLES) == ["my_attacks.py", "my_losses.py", "my_mining.py"]
    assert all(text.count("\n") < 40 for text in EXAMPLES.values())


def test_the_examples_train_and_resume_to_the_same_weights(own: Any, new_reporter: Any) -> None:
    test = {"squares": {"kind": "my_attacks:random_squares"}}
    config = digits_config(**THREE, training={"epochs": 2, "log_every_steps": 1}, evaluation={"test": test})
    whole, stopped = new_reporter(), new_reporter(stop_after=1)
    result = fit(config, WorkerContext(), whole)
    assert 0 < result.test["robust_accuracy/squares"] < result.test["clean_accuracy"]
    assert all(epoch["train/my_losses:agreement"] > 0 for epoch in whole.metrics)
    assert fit(config, WorkerContext(), stopped).interrupted
    assert not stopped.metrics  # in mid-epoch
    resumed = new_reporter(resume_from=stopped.checkpoints[-1])
    fit(config, WorkerContext(), resumed)
    assert weights_of(resumed.checkpoints[-1]) == weights_of(whole.checkpoints[-1])
    assert resumed.metrics[-1]["train/my_losses:agreement"] == whole.metrics[-1]["train/my_losses:agreement"]


def test_functions_are_part_of_what_identifies_a_run() -> None:
    plain = digits_config()
    digests = {digits_config(**{name: value}).digest for name, value in THREE.items()}
    assert len(digests | {plain.digest}) == 4
    assert digits_config(loss={"extra": {}}, mining={"miner": None}).digest == plain.digest


def test_an_own_function_that_does_what_the_built_in_one_does_changes_nothing(own: Any) -> None:
    own(
        "same.py",
        "import tla_service.attacks as a, tla_service.triplets as t\n"
        "def attack(*given): return a.craft(*given)\n"
        "def miner(anchors, labels, pool, pool_labels, generator):\n"
        "    return t.mine_hardest(anchors, labels, pool, pool_labels)\n"
        "def nothing(adversarial, clean, labels): return 0 * adversarial.logits.sum(1)\n",
    )
    mining = {"pool": "separate", "pool_size": 12}
    gradients = []
    for changes in ({}, {"attack": {"kind": "same:attack"}, "mining": {"miner": "same:miner"}}):
        net = network()
        step = TrainingStep(
            net, digits_config(**changes | {"mining": mining | changes.get("mining", {})}), WorkerContext()
        )
        step.backward(random_batch(pool=12), 0)
        gradients.append([parameter.grad for parameter in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    with_term = digits_config(method="at", loss={"extra": {"same:nothing": 3.0}})
    plain = loss_of(TrainingStep(network(), digits_config(method="at"), WorkerContext()), random_batch())[0]
    assert torch.equal(loss_of(TrainingStep(network(), with_term, WorkerContext()), random_batch())[0], plain)


def test_both_passes_of_a_weight_perturbation_add_the_same_noise(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the miner, which draws, is called in the first alone."""
    seen: list[tuple[torch.Tensor, ...]] = []
    forward = TrainingStep._forward
    monkeypatch.setattr(TrainingStep, "_forward", lambda self, *images: seen.append(images) or forward(self, *images))
    mining = {"pool": "separate", "pool_size": 12, "clean_noise": 0.1, "clean_noise_on": "all"}
    config = digits_config(attack={"awp": True}, mining=mining | THREE["mining"])
    TrainingStep(network(), config, WorkerContext()).backward(random_batch(pool=12), 0)
    assert all(torch.equal(first, second) for first, second in zip(*seen, strict=True))


def test_a_term_is_weighted_and_averaged_like_the_others(own: Any) -> None:
    own(
        "squares.py",
        "def term(adversarial, clean, labels): return (adversarial.logits - clean.logits).square().sum(1)\n",
    )
    batch = random_batch()
    alp, term = (
        digits_config(**changes)
        for changes in (
            {"method": "alp", "loss": {"logit_pairing_weight": 0.7}},
            {"method": "at", "loss": {"clean_weight": 0.5, "extra": {"squares:term": 0.7}}},
        )
    )
    expected, _ = loss_of(TrainingStep(network(), alp, WorkerContext()), batch)
    found, totals = loss_of(TrainingStep(network(), term, WorkerContext()), batch)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert len(totals) == len(TOTALS) + 1


def test_what_an_attack_returns_is_projected() -> None:
    images, labels = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    for norm, epsilon in (("linf", 0.1), ("l2", 0.5)):
        attack = Attack("far", norm, epsilon, function=lambda _, images, *__: images.add_(7))  # type: ignore[arg-type]
        before = images.clone()
        found = craft(lambda x: x.flatten(1), images, labels, attack)
        assert torch.equal(images, before)
        length = torch.linalg.vector_norm((found - images).flatten(1), torch.inf if norm == "linf" else 2, dim=1)
        assert float(length.max()) <= epsilon + 1e-6
        assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_pixels_that_are_not_finite_break_no_image_of_an_evaluation() -> None:
    images, labels = torch.rand(4, 1, 2, 2), torch.rand(4, 4).argmax(1)
    attack = Attack("nan", function=lambda _, images, *__: images * torch.nan)
    logits = torch.nn.functional.one_hot(labels, 4).float()
    with pytest.raises(ConfigError, match="attack=nan: returned pixels that are not finite"):
        attack_images(lambda x: logits[: len(x)] + 0 * x.sum(), images, labels, attack)


BAD = """
import torch
number = 3
def attack_two(images, labels): return images
def attack_list(logits_fn, images, labels, attack, generator): return [images]
def attack_small(logits_fn, images, labels, attack, generator): return images[:1]
def attack_far(logits_fn, images, labels, attack, generator): return (images + 2 * attack.epsilon).clamp(0, 1)
def attack_out(logits_fn, images, labels, attack, generator): return images - attack.epsilon
def attack_nan(logits_fn, images, labels, attack, generator): return images / 0
def attack_raises(logits_fn, images, labels, attack, generator): return images @ labels
def term_mean(adversarial, clean, labels): return adversarial.logits.mean()
def term_flat(adversarial, clean, labels): return adversarial.logits.detach().sum(1)
def term_root(adversarial, clean, labels): return (adversarial.logits - adversarial.logits).square().sum(1).sqrt()
def term_nan(adversarial, clean, labels): return adversarial.logits.sum(1) * torch.nan
def miner_rows(anchors, anchor_labels, pool, pool_labels, generator): return anchor_labels
def miner_float(anchors, anchor_labels, pool, pool_labels, generator): return anchor_labels * 1.0, anchor_labels > -1
def miner_far(anchors, anchor_labels, pool, pool_labels, generator): return anchor_labels + 8, anchor_labels > -1
"""
REFUSED = {
    "nowhere:attack": (UnavailableError, "nowhere"),
    "bad:missing": (ConfigError, "has no function missing"),
    "bad:number": (ConfigError, "has no function number"),
    "broken:attack": (ConfigError, "does not import"),
    "bad:attack_two": (ConfigError, "TypeError: attack_two.* takes 2 .*it is called as attack_two\\(logits_fn, images"),
    "bad:attack_list": (ConfigError, "returned list for images"),
    "bad:attack_small": (ConfigError, "returned \\(1, 1, 8, 8\\) for images \\(8, 1, 8, 8\\)"),
    "bad:attack_far": (ConfigError, "left the ball: a perturbation of 0.3 with epsilon 0.15"),
    "bad:attack_out": (ConfigError, "returned pixels in \\[-0.15, "),
    "bad:attack_nan": (ConfigError, "not finite"),
    "bad:attack_raises": (ConfigError, "fails on 8 training images \\(RuntimeError: "),
    "bad:term_mean": (ConfigError, "returned \\(\\) float32 for 8 images"),
    "bad:term_flat": (ConfigError, "has no gradient"),
    "bad:term_root": (ConfigError, "has a gradient that is not finite"),
    "bad:term_nan": (ConfigError, "returned values that are not finite"),
    "bad:miner_rows": (ConfigError, "returned \\(8,\\) int64 and NoneType for 8 anchors"),
    "bad:miner_float": (ConfigError, "returned \\(8,\\) float32 and \\(8,\\) bool"),
    "bad:miner_far": (ConfigError, "returned rows that a pool of 8 does not have"),
}


def naming(path: str, *, evaluation: bool = False) -> tuple[str, RunConfig]:
    """The field for a function, and a run with it."""
    if "term" in path:
        return f"loss.extra.{path}", digits_config(loss={"extra": {path: 1}})
    if "miner" in path:
        return "mining.miner", digits_config(mining={"miner": path})
    if evaluation:
        return "evaluation.test.mine.kind", digits_config(evaluation={"test": {"mine": {"kind": path}}})
    return "attack.kind", digits_config(attack={"kind": path})


@pytest.mark.parametrize(
    ("path", "evaluation"),
    [*((path, False) for path in REFUSED), *((path, True) for path in REFUSED if "attack" in path)],
)
def test_what_does_not_fit_is_refused_before_the_run(
    own: Any, reporter: KeepingReporter, path: str, evaluation: bool
) -> None:
    own("bad.py", BAD)
    own("broken.py", "1 / 0\n")
    error, match = REFUSED[path]
    field, config = naming(path, evaluation=evaluation)
    with pytest.raises(UserError, match=match) as raised:
        Run(config, WorkerContext(), reporter)
    assert isinstance(raised.value, error)
    assert str(raised.value).startswith(f"{field}={path}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attack": {"kind": "pdg"}},
            "attack.kind=pdg: not one of pgd, n_fgsm, free, and not module:function; did you",
        ),
        ({"attack": {"kind": "a/b:c"}}, "attack.kind=a/b:c: not one of pgd"),
        ({"evaluation": {"validation": {"kind": "a:"}}}, "evaluation.validation.kind=a:: not one of fgsm, bim, pgd"),
        ({"attack": {"kind": "a:b"}, "speed": {"cuda_graphs": True}}, "speed.cuda_graphs=True: your own attack"),
        ({"attack": {"kind": "a:b", "batchnorm": "train"}}, "attack.batchnorm=train: your own attack"),
        (
            {"attack": {"kind": "a:b"}, "mining": {"pool": "separate", "queries": "last_step"}},
            "mining.queries=last_step: your own attack",
        ),
        ({"method": "at", "mining": {"miner": "a:b"}}, "mining.miner=a:b: method at mines no negatives"),
        ({"method": "tla_rn", "mining": {"miner": "a:b"}}, "mining.miner=a:b: method tla_rn mines no negatives"),
        ({"mining": {"miner": "a:b", "keep_probability": 0.5}}, "mining.keep_probability=0.5: your own miner"),
        ({"mining": {"miner": "hardest"}}, "mining.miner=hardest: "),
        ({"loss": {"extra": {"agreement": 1}}}, "loss.extra=agreement: "),
    ],
    ids=str,
)
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config("digits", **changes)
    assert str(raised.value).startswith(message)


def test_functions_from_a_folder_travel_with_the_run(tmp_path: Path) -> None:
    folder, output = tmp_path / "code", tmp_path / "run"
    folder.mkdir()
    for name, text in EXAMPLES.items():
        (folder / name).write_text(text)
    test = {"squares": {"kind": "my_attacks:random_squares"}}
    config = digits_config(**THREE, model={"code": str(folder)}, training={"epochs": 1}, evaluation={"test": test})
    summary = train(config, output)
    assert not set(sys.modules) & {"my_attacks", "my_losses", "my_mining"}
    moved = folder.rename(tmp_path / "moved")
    checkpoint = next((output / "checkpoints").glob("step-*"))
    found = evaluate(checkpoint)
    assert found["robust_accuracy"]["squares"] == pytest.approx(summary["robust_accuracy"]["squares"])
    (moved / "my_losses.py").write_text(EXAMPLES["my_losses.py"] + "# changed\n")
    changed = config.model_copy(update={"model": config.model.model_copy(update={"code": str(moved)})})
    (output / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"^model\.code="):
        train(changed, output)


def test_an_attack_from_a_folder_pickles_by_value(tmp_path: Path) -> None:
    """Tasks of an evaluation run where the folder is not."""
    import cloudpickle

    (tmp_path / "my_attacks.py").write_text(EXAMPLES["my_attacks.py"])
    function = load_function("attack.kind", "my_attacks:random_squares", pack(str(tmp_path)))
    assert "my_attacks" not in sys.modules
    assert pickle.loads(cloudpickle.dumps(Attack("own", function=function))).function.__name__ == "random_squares"
