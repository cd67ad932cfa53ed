"""Stages for a GPU: numerical checks, seconds per epoch, and the effect of bfloat16 on AutoAttack accuracy."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.results import Results
from benchmarks.settings import BenchmarkSettings
from benchmarks.stages import Changes, context_of, merged
from benchmarks.switches import COMMON_SWITCHES
from benchmarks.timing import take_turns
from benchmarks.workloads import FullStep, Workload
from tla_service.attacks.autoattack import run_autoattack
from tla_service.data import Batch
from tla_service.models import LogitsOnly
from tla_service.runtime import generator
from tla_service.training.fit import Run
from tla_service.training.reporting import LocalReporter
from tla_service.training.step import TOTALS

# Measured against a base that has them all on, so that each line says what one is worth to the others.
_OFF: list[tuple[str, Changes, Changes]] = [
    ("training.precision: bfloat16", {}, {"training": {"precision": "float32"}}),
    ("training.channels_last: true", {}, {"training": {"channels_last": False}}),
    ("speed.compile: all", {}, {"speed": {"compile": "none"}}),
    ("speed.cuda_graphs: true", {}, {"speed": {"cuda_graphs": False}}),
]
_IN_BASE = ("training.channels_last", "training.precision")
SWITCHES = [entry for entry in COMMON_SWITCHES if not entry[0].startswith(_IN_BASE)] + _OFF
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
            loss = float(sums[TOTALS.index("total")])
            for name, (changes, tolerance) in _VARIANTS.items():
                if "cuda_graphs" in changes.get("speed", {}) and context.device.type != "cuda":
                    continue
                fast = FullStep(workload, context, **merged(_EAGER, changes))
                images = fast.adversary.craft(batch.anchors, generator(context.device, 1))
                # A sign that rounding has flipped moves a pixel by up to two steps: pixels are counted, not compared.
                moved = float(((images - expected).abs() > workload.step_size / 2).float().mean())
                _, totals = fast.step.objective(batch, expected, generator(context.device, 2))
                error = abs(float(totals[TOTALS.index("total")]) - loss) / abs(loss)
                rows.append([workload.name, name, f"{100 * moved:.2f} %", f"{error:.1e}"])
                inside = float((images - batch.anchors.images).abs().max()) <= workload.epsilon + 1e-6
                if error > tolerance or not inside:
                    wrong.append(f"{workload.name}, {name}: loss off by {error:.1e}, inside the ball: {inside}")
    results.table("Numerics", ["network", "variant", "pixels that differ", "relative error of the loss"], rows)
    if wrong:
        raise RuntimeError("numerics: " + "; ".join(wrong))


def measure_epochs(
    work: dict[str, Workload], settings: BenchmarkSettings, results: Results, bases: dict[str, Changes]
) -> None:
    """Seconds of 50,000 training images with TLA, from runs of twenty steps."""
    context, rows = context_of(settings), []
    for key, workload in work.items():
        for name, base in bases.items():
            step = FullStep(workload, context, **base)
            times = take_turns({"step": step}, rounds=settings.rounds, burn_in=5, repeats=20)
            seconds = times.seconds("step").median * _EPOCH / workload.batch_size
            rows.append([workload.name, name, f"{seconds:.2f}", f"{_EPOCH_BARS[key]:g}"])
            results.raw[f"epoch seconds {key}, {name}"] = seconds
            del step  # its graphs hold gigabytes
    results.table("Epochs", ["network", "settings", "s for 50,000 images", "bar"], rows)


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
            training={**training, "precision": precision},
            optimizer={"learning_rate": 0.1, "weight_decay": 5e-4},
        )
        with tempfile.TemporaryDirectory(prefix="tla-benchmark-") as folder:
            run = Run(config, context, LocalReporter(Path(folder)))
            run.start(None)
            while run.state.step < run.total_steps:
                run.train_epoch()
                run.finish_epoch()
        network = LogitsOnly(run.state.network).eval()
        test = _first_test_images(run, settings.accuracy_images, context.device)
        epsilon = work[key].epsilon
        with _exact_float32():
            found = run_autoattack(
                network, test.images, test.labels, norm="linf", epsilon=epsilon, seed=0, batch_size=500
            )
        clean = float((found.broken_at != 0).float().mean())
        seconds = run.phases.seconds["train"] / settings.accuracy_epochs
        robust = float(found.robust.float().mean())
        name = f"{work[key].model}, seed {settings.accuracy_seed}"
        rows.append([name, precision, f"{seconds:.1f}", f"{100 * clean:.1f}", f"{100 * robust:.1f}"])
    columns = ["network", "precision", "s per epoch", "clean accuracy, %", "accuracy under AutoAttack, %"]
    results.table("Precision and robustness", columns, rows)


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
