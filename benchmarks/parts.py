"""Time per part of a training step."""

from collections.abc import Callable

from benchmarks.results import Results
from benchmarks.settings import BenchmarkSettings
from benchmarks.stages import Changes, context_of
from benchmarks.timing import Spread, take_turns
from benchmarks.workloads import FullStep, Workload
from tla_service.runtime import autocast, generator
from tla_service.triplets import mine_hardest


def measure_parts(work: dict[str, Workload], settings: BenchmarkSettings, results: Results, base: Changes) -> None:
    """Time per part of a TLA step, each between two synchronizations."""
    rows = []
    for key, workload in work.items():
        parts = Parts(FullStep(workload, context_of(settings), **base))
        turns: dict[str, list[float]] = {}
        for turn in range(settings.rounds + 1):
            for name, run in parts.in_order().items():
                seconds = take_turns({name: run}, rounds=1, burn_in=0).wall[name][0]
                if turn:
                    turns.setdefault(name, []).append(seconds)
        medians = {name: Spread.of(values) for name, values in turns.items()}
        whole = sum(spread.median for name, spread in medians.items() if name != Parts.MINING)
        for name, spread in medians.items():
            rows.append([workload.name, name, f"{1000 * spread.median:.1f}", f"{100 * spread.median / whole:.1f} %"])
        results.raw[f"parts {key}"] = {name: spread.median for name, spread in medians.items()}
    results.table("Parts", ["network", "part", "ms per step", "share"], rows)


class Parts:
    """A step, part by part."""

    MINING = "embed and mine alone (within the forward part)"

    def __init__(self, step: FullStep) -> None:
        self.step, self.random = step, generator(step.context.device, 0)
        self.raw = step.next_raw()
        self.batch = step.batches.augmented(self.raw)
        self.images = self.batch.anchors.images

    def in_order(self) -> dict[str, Callable[[], object]]:
        """The parts, in the order in which a step runs them."""
        return {
            "wait for data": self.read,
            "augmentation": self.augment,
            "attack": self.attack,
            "forward, mining, loss": self.forward,
            "backward": self.backward,
            "optimizer": self.step.optimizer.step,
            "meter": lambda: self.step.meter.add(self.totals),
            self.MINING: self.mine,
        }

    def read(self) -> None:
        """Wait for the next images; gather them."""
        self.raw = self.step.next_raw()

    def augment(self) -> None:
        """Crop, flip and scale them."""
        self.batch = self.step.batches.augmented(self.raw)

    def attack(self) -> None:
        """Generate the adversarial images."""
        self.images = self.step.adversary.craft(self.batch.anchors, self.random)

    def forward(self) -> None:
        """All roles through the network, negatives, and the loss."""
        self.step.optimizer.zero_grad(set_to_none=True)
        self.loss, self.totals = self.step.step.objective(self.batch, self.images, self.random)

    def backward(self) -> None:
        """Gradients of all weights; with one worker there is no reduction."""
        self.loss.backward()

    def mine(self) -> None:
        """A separate forward pass of the clean images, and the search for negatives."""
        labels = self.batch.anchors.labels
        with autocast(self.step.config.training.precision, labels.device):
            (clean,) = self.step.step.wrapped(self.batch.anchors.images)
        embeddings = clean.embeddings.detach()
        mine_hardest(embeddings, labels, embeddings, labels)
