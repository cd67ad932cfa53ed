"""AutoAttack as evaluations run it, against the package called on the bare network: time, and every image's verdict."""

import torch
from pyautoattack import AutoAttack

from benchmarks.results import Results
from benchmarks.settings import BenchmarkSettings
from benchmarks.timing import Spread, take_turns
from benchmarks.workloads import Workload
from tla_service.attacks import Attack, craft
from tla_service.attacks.autoattack import run_autoattack
from tla_service.config import DataConfig
from tla_service.data import load_dataset
from tla_service.evaluation.shards import as_pixels, evaluating, frozen, logits_of
from tla_service.models import build_model
from tla_service.runtime import generator

_BATCH, _STEPS, _BAR = 200, 400, 1 / 1.3


def measure_evaluation(_work: dict[str, Workload], settings: BenchmarkSettings, results: Results) -> None:
    """A small network trained with PGD, on MNIST in `data_root`, else on digits; then both on its test images."""
    name, model, epsilon = ("mnist", "small_cnn", 0.3) if settings.data_root else ("digits", "digits_cnn", 0.15)
    device = torch.device("cpu")
    root = str(settings.data_root) if settings.data_root else None
    dataset = load_dataset(DataConfig.model_validate({"name": name, "root": root}))
    torch.manual_seed(0)
    network = build_model(model, 10, dataset.image_shape)
    optimizer, draws = torch.optim.Adam(network.parameters(), 0.002), generator(device, 0)
    logits_fn = logits_of(network)
    for step in range(_STEPS):
        rows = torch.randint(len(dataset.train.labels), (128,), generator=draws)
        clean, truth = as_pixels(dataset.train.fetch(rows), device), dataset.train.labels[rows]
        radius = epsilon * min(1, 2 * step / _STEPS)
        attack = Attack(epsilon=radius, step_size=radius / 4, num_steps=7)
        loss = torch.nn.functional.cross_entropy(logits_fn(craft(logits_fn, clean, truth, attack, draws)), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rows = torch.arange(min(settings.accuracy_images, len(dataset.test.labels)))
    images, labels = as_pixels(dataset.test.fetch(rows), device), dataset.test.labels[rows]
    verdicts: dict[str, torch.Tensor] = {}

    def ours() -> None:
        with evaluating(network):
            twin_fn = logits_of(frozen(network, images[:_BATCH]))
            verdicts["ours"] = run_autoattack(
                logits_fn, images, labels, norm="linf", epsilon=epsilon, seed=0, batch_size=_BATCH, crafted_on=twin_fn
            ).robust

    def package() -> None:
        library = AutoAttack(logits_fn, eps=epsilon, norm="Linf", seed=0, version="standard")
        verdicts["package"] = library.run_standard_evaluation(images, labels, batch_size=_BATCH)[1] == labels

    network.eval()
    times = take_turns({"ours": ours, "package": package}, rounds=1, burn_in=0)
    ratio = times.ratio("ours", "package", settings.clock)
    same = int((verdicts["ours"] == verdicts["package"]).sum())
    results.ratio(f"cpu {name}: AutoAttack over the package", ratio, _BAR)
    results.ratio(f"cpu {name}: images with another verdict", Spread.of([float(len(labels) - same)]), 0.0)
    row = [name, str(len(labels)), f"{times.seconds('ours').median:.0f}", f"{times.seconds('package').median:.0f}"]
    robust = f"{float(verdicts['ours'].double().mean()):.1%}"
    results.table(
        "Evaluation",
        ["data", "images", "ours, s", "package, s", "package over ours", "robust", "same verdicts"],
        [[*row, f"{1 / ratio.median:.2f}", robust, f"{same} of {len(labels)}"]],
    )
