"""Pretrained weights: where they come from, how they fit, and what fine-tuning keeps of them."""

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tla_service.config import RunConfig
from tla_service.errors import ConfigError, UnavailableError, UserError
from tla_service.models import ImageClassifier
from tla_service.models.published import published_entries
from tla_service.models.weights import Fit, fit, read_entries
from tla_service.training.checkpoint import verify_checkpoint

_FIELD = "model.pretrained"
_MLFLOW = ("models:", "runs:")


def checkpoint_weights(address: str) -> Mapping[str, Tensor]:
    """The best weights of a checkpoint folder, by name, on the CPU; UserError if there are none, or it is damaged."""
    if address.startswith(_MLFLOW):
        remedy = "give a file or a checkpoint folder, or use jobs/train_tla.py"
        raise ConfigError(_FIELD, address, "an address of MLflow, which is not used here", remedy)
    path = Path(address).expanduser() / "best.safetensors"
    if not path.is_file():
        raise UnavailableError(_FIELD, address, "no best.safetensors in it", "give a checkpoint folder")
    verify_checkpoint(path.parent)
    return load_file(path)


def find_pretrained(
    config: RunConfig, network: ImageClassifier, load: Callable[[str], Mapping[str, Tensor]] = checkpoint_weights
) -> Fit:
    """The weights of `model.pretrained` under the network's names, without the head if that is new; empty if not set.

    The notes say what is used. `load` returns the tensors at an address that is neither a file nor a library. Raises
    UserError if the weights are missing or do not fit, or the network has no BatchNorm to freeze.
    """
    source, head = config.model.pretrained, config.model.head
    if source is None:
        return Fit({}, ())
    path = Path(source).expanduser()
    try:
        entries = published_entries(source, config.model.name)
        if entries is None:
            if not (source.startswith(_MLFLOW) or path.exists()):
                remedy = "give a file of weights, a checkpoint folder, models:/... or runs:/..."
                raise UnavailableError(_FIELD, source, "there is no such file or folder", remedy)
            entries = read_entries(path) if path.is_file() else {"": dict(load(source))}
        found = fit(entries, network, source, new_head=head == "new")
    except UserError as error:
        raise type(error)(_FIELD, source, error.reason, error.remedy) from error
    if config.training.freeze_batchnorm and not any(isinstance(module, _BatchNorm) for module in network.modules()):
        field, reason = "training.freeze_batchnorm", f"{config.model.name} has no BatchNorm"
        raise ConfigError(field, True, reason, "leave it out")
    kept = "its head" if head == "keep" else f"a new head for {network.classifier.out_features} classes"
    start = f"starting from {source} with {kept}"
    return Fit(found.state_dict, (start, *(f"{source}: {note}" for note in found.notes)))


def set_train_mode(network: nn.Module, config: RunConfig) -> nn.Module:
    """Training mode; BatchNorm stays in eval mode, with its statistics, if these are frozen."""
    network.train()
    if config.training.freeze_batchnorm:
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    return network
