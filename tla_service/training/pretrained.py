"""Pretrained weights: where they come from, how they fit, and what fine-tuning keeps of them."""

import json
from collections.abc import Callable, Mapping

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tla_service.config import RunConfig
from tla_service.config.loading import CONFIG, load_config_file
from tla_service.errors import ConfigError, UnavailableError, UserError
from tla_service.files import expanded
from tla_service.models import Architecture, ImageClassifier
from tla_service.models.catalog import activation_of, normalization_of
from tla_service.models.published import published_entries
from tla_service.models.weights import Fit, fit, read_entries
from tla_service.training.checkpoint import CODE, verify_checkpoint

_FIELD = "model.pretrained"
_MLFLOW = ("models:", "runs:")
_NO_PATHS = {"models", "runs", "torchvision", "timm"}


def checkpoint_weights(address: str) -> Mapping[str, Tensor]:
    """The best weights of a checkpoint folder, by name, on the CPU; UserError if there are none, or it is damaged."""
    if address.startswith(_MLFLOW):
        remedy = "give a file or a checkpoint folder, or use jobs/train_tla.py"
        raise ConfigError(_FIELD, address, "an address of MLflow, which is not used here", remedy)
    path = expanded(_FIELD, address) / "best.safetensors"
    if not path.is_file():
        raise UnavailableError(_FIELD, address, "no best.safetensors in it", "give a checkpoint folder")
    verify_checkpoint(path.parent)
    return load_file(path)


def checkpoint_network(address: str) -> nn.Module | Mapping[str, Tensor]:
    """The network of a checkpoint folder with its best weights, or these alone; errors as `checkpoint_weights`."""
    weights, folder = checkpoint_weights(address), expanded(_FIELD, address)
    if not (folder / CONFIG).is_file():
        return weights
    code, facts = folder / CODE, json.loads((folder / "data.json").read_text())
    model = load_config_file(folder / CONFIG).model
    architecture = Architecture.of(model, code.read_bytes() if code.exists() else None)
    network = architecture.build(len(facts["class_names"]), tuple(facts["image_shape"]))
    network.load_state_dict(weights)
    return network


def check_source(config: RunConfig) -> None:
    """Raise UnavailableError, before any data is read, if `model.pretrained` is a path and nothing is there."""
    source = config.model.pretrained
    if source is not None and source.partition(":")[0] not in _NO_PATHS and not expanded(_FIELD, source).exists():
        remedy = "give a file of weights, a checkpoint folder, models:/... or runs:/..."
        raise UnavailableError(_FIELD, source, "there is no such file or folder", remedy)


def find_pretrained(
    config: RunConfig,
    network: ImageClassifier,
    load: Callable[[str], nn.Module | Mapping[str, Tensor]] = checkpoint_network,
) -> Fit:
    """The weights of `model.pretrained` under the network's names, without the head if that is new; empty if not set.

    The notes say what is used. `load` returns the network, or its tensors, at an address that is neither a file nor a
    library. Raises UserError if the weights are missing or do not fit, were trained with another normalization or
    activation, or the network has no BatchNorm to freeze, or no linear head of its own.
    """
    source, head = config.model.pretrained, config.model.head
    if source is None:
        return Fit({}, ())
    check_source(config)
    path, other = expanded(_FIELD, source), None
    try:
        entries = published_entries(source, config.model.name)
        if entries is None:
            other = None if path.is_file() else load(source)
            tensors = other.state_dict() if isinstance(other, nn.Module) else other
            entries = read_entries(path) if tensors is None else {"": dict(tensors)}
        found = fit(entries, network, source, new_head=head == "new")
        if isinstance(other, nn.Module):
            _check_function(other, network)
    except UserError as error:
        raise type(error)(_FIELD, source, error.reason, error.remedy) from error
    check_fine_tuning(config, network)
    kept = "its head" if head == "keep" else f"a new head for {network.classifier.out_features} classes"
    start = f"starting from {source} with {kept}"
    return Fit(found.state_dict, (start, *(f"{source}: {note}" for note in found.notes)))


def check_fine_tuning(config: RunConfig, network: ImageClassifier) -> None:
    """Raise ConfigError for a setting of fine-tuning that would have no effect on this network."""
    if config.training.freeze_batchnorm and not any(isinstance(module, _BatchNorm) for module in network.modules()):
        field, reason = "training.freeze_batchnorm", f"{config.model.name} has no BatchNorm"
        raise ConfigError(field, True, reason, "leave it out")
    of_head = {"model.head": (config.model.head, "keep"), "optimizer.body_rate": (config.optimizer.body_rate, 1)}
    for field, (value, default) in of_head.items():
        if value != default and not [*network.classifier.parameters()]:
            raise ConfigError(field, value, f"{config.model.name} has no linear head", "leave it out")


def _check_function(theirs: nn.Module, ours: nn.Module) -> None:
    """Compare what no tensor tells: a network trained with another normalization or activation is another function."""
    for field, name_of in (("normalization", normalization_of), ("activation", activation_of)):
        if (name := name_of(theirs)) != name_of(ours):
            reason = f"its network has another {field}"
            raise ConfigError(_FIELD, None, reason, f"set model.{field} to {name}")


def set_train_mode(network: nn.Module, config: RunConfig) -> nn.Module:
    """Training mode; BatchNorm stays in eval mode, with its statistics, if these are frozen."""
    network.train()
    if config.training.freeze_batchnorm:
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    return network
