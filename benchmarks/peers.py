"""Other libraries on the same network, images and PGD, with their default settings."""

import contextlib
import io
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.elsewhere import Candidates, elsewhere
from benchmarks.workloads import CLASSES, Workload
from tla_service.models import LogitsOnly, build_model
from tla_service.runtime import WorkerContext

CraftFn = Callable[[], Tensor]
LIBRARIES = {"torchattacks": "torchattacks", "foolbox": "foolbox", "ART": "art"}


@contextlib.contextmanager
def peers(
    kind: Literal["steps", "attacks"], workload: Workload, context: WorkerContext
) -> Iterator[Mapping[str, Callable[[], object]]]:
    """Other libraries' steps or attacks by name, of those that are installed.

    On a CPU they run in a process of their own, whose allocator is as their users have it: this process keeps the
    memory that it frees. On a GPU torch allocates for all, and a second process would need a second CUDA context.
    """
    installed = [name for name, module in LIBRARIES.items() if find_spec(module) is not None]
    if context.device.type == "cuda":
        yield dict(_built(kind, workload, context, installed))
        return
    with elsewhere(_built, kind, workload, context, installed) as found:
        yield found


def _built(kind: str, workload: Workload, context: WorkerContext, libraries: Collection[str]) -> Candidates:
    work = PeerWork(workload, context, libraries)
    return work.steps() if kind == "steps" else work.attacks()


class PeerWork:
    """One network and batch for other libraries, in float32 and eager mode.

    Args:
        workload: What.
        context: Where.
        libraries: Those of `LIBRARIES` to use.
    """

    def __init__(self, workload: Workload, context: WorkerContext, libraries: Collection[str]) -> None:
        torch.manual_seed(0)
        self.workload, self.device, self.libraries = workload, context.device, libraries
        network = build_model(workload.model, CLASSES, workload.image_shape)
        self.network = LogitsOnly(network).to(context.device)
        self.images = torch.rand(workload.batch_size, *workload.image_shape, device=context.device)
        self.labels = torch.arange(workload.batch_size, device=context.device) % CLASSES
        settings = workload.config().optimizer
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(network.parameters(), settings.learning_rate)
        if settings.name == "sgd":
            self.optimizer = torch.optim.SGD(network.parameters(), settings.learning_rate, momentum=settings.momentum)

    def attacks(self) -> Iterator[tuple[str, CraftFn]]:
        """PGD of each library, and of a loop that calls `backward()`."""
        yield "backward() loop", self.backward_loop
        makers = {"torchattacks": self._torchattacks, "foolbox": self._foolbox, "ART": self._art}
        for name, make in makers.items():
            if name in self.libraries:
                yield name, make()

    def steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """An adversarial training step around each of those attacks, and ART's own trainer."""
        for name, craft in self.attacks():
            if name != "ART":
                yield name, partial(self._step, craft)
        if "ART" in self.libraries:
            yield "ART AdversarialTrainerMadryPGD", self._art_trainer()

    def backward_loop(self) -> Tensor:
        """PGD as most tutorials write it: `loss.backward()`, which computes all weight gradients as well."""
        work = self.workload
        self.network.eval()
        adversarial = self.images + torch.empty_like(self.images).uniform_(-work.epsilon, work.epsilon)
        adversarial = adversarial.clamp(0, 1).detach()
        for _ in range(work.num_steps):
            adversarial.requires_grad_()
            self.network.zero_grad()
            F.cross_entropy(self.network(adversarial), self.labels).backward()
            assert adversarial.grad is not None
            moved = adversarial.detach() + work.step_size * adversarial.grad.sign()
            moved = torch.min(torch.max(moved, self.images - work.epsilon), self.images + work.epsilon)
            adversarial = moved.clamp(0, 1).detach()
        return adversarial

    def _step(self, craft: CraftFn) -> None:
        adversarial = craft()
        self.network.train()
        self.optimizer.zero_grad()
        F.cross_entropy(self.network(adversarial), self.labels).backward()
        self.optimizer.step()

    def _torchattacks(self) -> CraftFn:
        import torchattacks

        work = self.workload
        self.network.eval()
        attack = torchattacks.PGD(self.network, eps=work.epsilon, alpha=work.step_size, steps=work.num_steps)

        def craft() -> Tensor:
            adversarial: Tensor = attack(self.images, self.labels)
            return adversarial

        return craft

    def _foolbox(self) -> CraftFn:
        import foolbox

        work = self.workload
        attack = foolbox.attacks.LinfPGD(abs_stepsize=work.step_size, steps=work.num_steps, random_start=True)
        model = foolbox.PyTorchModel(self.network.eval(), bounds=(0, 1), device=self.device)

        def craft() -> Tensor:
            self.network.eval()
            _, adversarial, _ = attack(model, self.images, self.labels, epsilons=work.epsilon)
            found: Tensor = adversarial
            return found

        return craft

    def _art_classifier(self) -> Any:
        from art.estimators.classification import PyTorchClassifier

        return PyTorchClassifier(
            self.network,
            loss=torch.nn.CrossEntropyLoss(),
            optimizer=self.optimizer,
            input_shape=self.workload.image_shape,
            nb_classes=CLASSES,
            clip_values=(0, 1),
            device_type="gpu" if self.device.type == "cuda" else "cpu",
        )

    def _art(self) -> CraftFn:
        from art.attacks.evasion import ProjectedGradientDescent

        work = self.workload
        attack = ProjectedGradientDescent(
            self._art_classifier(),
            eps=work.epsilon,
            eps_step=work.step_size,
            max_iter=work.num_steps,
            num_random_init=1,
            batch_size=work.batch_size,
            verbose=False,
        )
        images, labels = self.images.cpu().numpy(), self.labels.cpu().numpy()
        return lambda: torch.from_numpy(attack.generate(images, labels))

    def _art_trainer(self) -> Callable[[], None]:
        from art.defences.trainer import AdversarialTrainerMadryPGD

        work = self.workload
        trainer = AdversarialTrainerMadryPGD(
            self._art_classifier(),
            nb_epochs=1,
            batch_size=work.batch_size,
            eps=work.epsilon,
            eps_step=work.step_size,
            max_iter=work.num_steps,
            num_random_init=1,
        )
        images, labels = self.images.cpu().numpy(), self.labels.cpu().numpy()

        def step() -> None:
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
                trainer.fit(images, labels)

        return step
