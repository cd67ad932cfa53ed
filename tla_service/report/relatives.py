"""Relatives of a model, which attacks can be crafted on: what it was fine-tuned from, its other weights.

An attacker who holds a relative need not follow the gradients of the model itself.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor, nn

from tla_service.errors import UserError, one_line
from tla_service.models import ImageClassifier
from tla_service.report.subjects import LoadSubject, Subject
from tla_service.training.pretrained import find_pretrained

_AVERAGED = "module."  # prefix of the averaged network's tensors


@dataclass(frozen=True)
class Kin:
    """A relative: its source and description, and its network on the CPU, in eval mode, or why there is none."""

    source: str
    about: str
    network: nn.Module | None = None
    why: str = ""

    @property
    def weights(self) -> str:
        """Eight hex digits that identify the weights."""
        assert self.network is not None
        digest = 0
        for value in self.network.state_dict().values():
            digest = crc32(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), digest)
        return f"{digest:08x}"


def find_relatives(subject: Subject, load_subject: LoadSubject) -> tuple[Kin, ...]:
    """The network a model was fine-tuned from, its last epoch and its weight average; those missing with the reason."""

    def stored(name: str) -> Mapping[str, Tensor] | str:
        if subject.stored is None:
            return "the model has no training run whose checkpoint could hold it"
        return subject.stored(name)

    def average() -> Mapping[str, Tensor] | str:
        if subject.config is not None and subject.config.training.ema_decay is None:
            return "the run kept no average of its weights (training.ema_decay)"
        found = stored("average.safetensors")
        if isinstance(found, str):
            return found
        return {name.removeprefix(_AVERAGED): value for name, value in found.items() if name.startswith(_AVERAGED)}

    def pretrained() -> Mapping[str, Tensor] | str:
        config = subject.config
        if config is None:
            return "the configuration that the model was trained with is not known"
        if config.model.pretrained is None:
            return "the model was not fine-tuned (model.pretrained)"
        if config.model.head != "keep":
            return "its head was replaced when fine-tuning began, so it knows other classes (model.head)"
        bare = copy.deepcopy(subject.network)
        assert isinstance(bare, ImageClassifier)
        load = lambda uri: load_subject(uri, "model.pretrained").network.state_dict()  # noqa: E731
        return find_pretrained(config, bare, load).state_dict

    return (
        _kin(subject, "pretrained", "the network it was fine-tuned from", pretrained),
        _kin(subject, "last", "its weights after the last epoch", lambda: stored("model.safetensors")),
        _kin(subject, "average", "the moving average of its weights, after the last epoch", average),
    )


def _kin(subject: Subject, source: str, about: str, find: Callable[[], Mapping[str, Tensor] | str]) -> Kin:
    try:
        found = find()
    except UserError as error:
        return Kin(source, about, why=error.reason)
    if isinstance(found, str):
        return Kin(source, about, why=found)
    network = copy.deepcopy(subject.network)
    try:
        network.load_state_dict(found)
    except RuntimeError as error:
        return Kin(source, about, why=f"its weights do not fit the network ({one_line(error)})")
    own = subject.network.state_dict()
    if all(torch.equal(value, own[name]) for name, value in network.state_dict().items()):
        return Kin(source, about, why="its weights are those of the model itself")
    return Kin(source, about, network.eval())
