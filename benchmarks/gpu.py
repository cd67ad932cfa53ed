"""Stages for a GPU: numerical checks, seconds per epoch by settings, and the effect of bfloat16 on robustness."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from benchmarks.results import Results
from benchmarks.settings import BenchmarkSettings
from benchmarks.stages import context_of
from benchmarks.timing import take_turns
from benchmarks.workloads import Changes, FullStep, Workload, merged
from tla_service.attacks import Attack, attack_images
from tla_service.attacks.autoattack import run_autoattack
from tla_service.data import Batch
from tla_service.models import LogitsOnly
from tla_service.runtime import generator
from tla_service.training.fit import Run
from tla_service.training.reporting import LocalReporter
from tla_service.training.step import TOTALS

_BF16: Changes = {"training": {"precision": "bfloat16"}}
# Settings of a run, from what is exact to all that is opt-in.
FAST: Changes = merged(_BF16, {"speed": {"compile": "all", "tune_kernels": True}})
VARIANTS: dict[str, Changes] = {
    "speed.mode: exact": {"speed": {"mode": "exact"}},
    "default": {},
    "compile: attack": {"speed": {"compile": "attack"}},
    "bfloat16": _BF16,
    "bfloat16, tune_kernels": merged(_BF16, {"speed": {"tune_kernels": True}}),
    "bfloat16, compile: attack": merged(_BF16, {"speed": {"compile": "attack"}}),
    "bfloat16, compile: all": merged(_BF16, {"speed": {"compile": "all"}}),
    "bfloat16, compile: all, tune_kernels": FAST,
}
# Variant of the step, and how far its loss may lie from float32 eager's, relatively.
_VARIANTS: dict[str, tuple[Changes, float]] = {
    "BatchNorm folded": ({"speed": {"fold_batchnorm": True}}, 1e-4),
    "channels_last": ({"training": {"channels_last": True}}, 1e-4),
    "attack compiled": ({"speed": {"compile": "attack"}}, 1e-4),
    "all compiled": ({"speed": {"compile": "all"}}, 1e-3),
    "CUDA graphs": ({"speed": {"cuda_graphs": True}}, 1e-4),
    "bfloat16": ({"training": {"precision": "bfloat16"}}, 3e-2),
}
_EAGER: Changes = {"speed": {"fold_batchnorm": False, "mode": "exact"}}
_EPOCH = 50_000
_EPOCH_BARS = {"preact_resnet_18": 8.0, "wrn_32_10": 45.0}


def check_numerics(work: dict[str, Workload], settings: BenchmarkSettings, results: Results) -> None:
    """Every fast variant against float32 eager: attacked pixels and the loss, on the same weights and images.

    Raises:
        RuntimeError: A variant computes something else.
    """
    context, rows, wrong = context_of(settings), [], []
    with _exact_float32():
        for workload in work.values():
            eager = FullStep(workload, context, **_EAGER)
            batch = eager.next_batch()
            expected = eager.adversary.craft(batch.anchors, generator(context.device, 1))
            _, sums = eager.step.objective(batch, expected, generator(context.device, 2))
            loss = float(sums[TOTALS.index("loss")])
            for name, (changes, tolerance) in _VARIANTS.items():
                if "cuda_graphs" in changes.get("speed", {}) and context.device.type != "cuda":
                    continue
                fast = FullStep(workload, context, **merged(_EAGER, changes))
                images = fast.adversary.craft(batch.anchors, generator(context.device, 1))
                # A sign that rounding has flipped moves a pixel by up to two steps: pixels are counted, not compared.
                moved = float(((images - expected).abs() > workload.step_size / 2).float().mean())
                _, totals = fast.step.objective(batch, expected, generator(context.device, 2))
                error = abs(float(totals[TOTALS.index("loss")]) - loss) / abs(loss)
                rows.append([workload.name, name, f"{100 * moved:.2f} %", f"{error:.1e}"])
                inside = float((images - batch.anchors.images).abs().max()) <= workload.epsilon + 1e-6
                if error > tolerance or not inside:
                    wrong.append(f"{workload.name}, {name}: loss off by {error:.1e}, inside the ball: {inside}")
    results.table("Numerics", ["network", "variant", "pixels that differ", "relative error of the loss"], rows)
    if wrong:
        raise RuntimeError("numerics: " + "; ".join(wrong))


def measure_settings(work: dict[str, Workload], settings: BenchmarkSettings, results: Results) -> None:
    """Seconds of 50,000 training images with TLA under several settings, from runs of ten steps, and of the start.

    Compiled kernels are cached on disk; the start is that of an empty cache only in a fresh environment.
    """
    context, rows = context_of(settings), []
    for key, workload in work.items():
        for name in settings.variants or VARIANTS:
            torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = False, True  # a step may change them
            began = time.monotonic()
            step = FullStep(workload, context, **VARIANTS[name])
            times = take_turns({"step": step}, rounds=1, burn_in=2)
            start = time.monotonic() - began
            times = take_turns({"step": step}, rounds=settings.rounds, repeats=10)
            seconds = times.seconds("step").median * _EPOCH / workload.batch_size
            rows.append([workload.name, name, f"{seconds:.1f}", f"{_EPOCH_BARS[key]:g}", f"{start:.0f}"])
            print(*rows[-1], flush=True)
            results.raw[f"epoch seconds {key}, {name}"] = seconds
            del step  # its graphs hold gigabytes
    columns = ["network", "settings", "s for 50,000 images", "bar", "s to the third step"]
    results.table("Settings", columns, rows)


def measure_accuracy_of_precisions(work: dict[str, Workload], settings: BenchmarkSettings, results: Results) -> None:
    """Train with float32 and with bfloat16, same seed, and attack both with AutoAttack in float32.

    Needs `--data_root` with CIFAR-10; a short training, whose two accuracies are to be compared, not admired. One seed
    a run: the rows of other seeds in the output file are kept.
    """
    if settings.data_root is None:
        print("accuracy: left out, give --data_root with CIFAR-10")
        return
    if find_spec("pyautoattack") is None:
        print("accuracy: left out, pyautoattack is not installed")
        return
    key = "preact_resnet_18"
    context, rows = context_of(settings), []
    training = {"epochs": settings.accuracy_epochs, "global_batch_size": work[key].batch_size}
    for precision in ("float32", "bfloat16"):
        config = work[key].config(
            seed=settings.accuracy_seed,
            data={"root": str(settings.data_root)},
            schedule={"name": "cyclic"},
            evaluation={"every_epochs": settings.accuracy_epochs},
            training={**training, "precision": precision},
            optimizer={"learning_rate": 0.1, "weight_decay": 5e-4},
        )
        with tempfile.TemporaryDirectory(prefix="tla-benchmark-") as folder:
            run = Run(config, context, LocalReporter(Path(folder)))
            run.start(None)
            while run.state.step < run.total_steps:
                run.train_epoch()
                run.finish_epoch()
        network = LogitsOnly(run.state.network).eval().requires_grad_(requires_grad=False)
        test = _first_test_images(run, settings.accuracy_images, context.device)
        epsilon = work[key].epsilon
        with _exact_float32():
            found = run_autoattack(
                network, test.images, test.labels, norm="linf", epsilon=epsilon, seed=0, batch_size=500
            )
        whole = _first_test_images(run, len(run.dataset.test), context.device)
        clean, pgd = _accuracies(network, whole, Attack(epsilon=epsilon, step_size=epsilon / 4, num_steps=50))
        found_all = [clean, pgd, float(found.robust.float().mean())]
        name = f"{work[key].model}, seed {settings.accuracy_seed}"
        rows.append([name, precision, *(f"{100 * value:.2f}" for value in found_all)])
        print(*rows[-1], flush=True)
    columns = ["network", "precision", "clean accuracy, %", "accuracy under PGD-50, %"]
    columns.append(f"accuracy under AutoAttack, {settings.accuracy_images} images, %")
    results.table("Precision and robustness", columns, rows)


def _accuracies(network: nn.Module, images: Batch, attack: Attack) -> tuple[float, float]:
    """Accuracy on clean images, and on attacked ones."""
    clean = robust = 0
    for pixels, labels in zip(images.images.split(1000), images.labels.split(1000), strict=True):
        found = attack_images(network, pixels, labels, attack, generator(pixels.device, 0))
        clean += int((found.broken_at != 0).sum())
        robust += int(found.robust.sum())
    return clean / len(images.labels), robust / len(images.labels)


def _first_test_images(run: Run, count: int, device: torch.device) -> Batch:
    chosen = torch.arange(min(count, len(run.dataset.test)))
    images = run.dataset.test.fetch(chosen).to(device).float() / 255
    return Batch(images, run.dataset.test.labels[chosen].to(device))


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Float32 as written, not TF32."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
