"""Weights that somebody else trained, as a registered version like our own."""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tla_service.config import RunConfig
from tla_service.data import EvaluationBatches, load_dataset, split_validation
from tla_service.errors import ConfigError, UnavailableError
from tla_service.evaluation.robustness import measure_accuracy
from tla_service.inference.detector import Rejector
from tla_service.models import build_model
from tla_service.registry.connection import client, experiment_id, one_line, retrying, tracking_uri
from tla_service.registry.environment import code_version
from tla_service.registry.job_settings import ImportSettings
from tla_service.registry.packaging import PackagedModel, log_model
from tla_service.registry.tracking import FINGERPRINT, RUN_KEY
from tla_service.runtime import WorkerContext
from tla_service.training.rejector import fit_rejector

if TYPE_CHECKING:
    from mlflow import MlflowClient

METHOD = "imported"
# Where published checkpoints keep the weights among other things, and what wrappers put before each name.
_HOLDERS = ("state_dict", "model_state_dict", "model", "net", "ema")
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "0.", "1.")
# Normalisation that lives in the network's configuration here, and a block that TRADES' forward never uses.
_NORMALIZATION = {"mu": "mean", "mean": "mean", "sigma": "std", "std": "std"}
_UNUSED = ("sub_block1.",)


def import_model(settings: ImportSettings) -> tuple[PackagedModel, dict[str, float]]:
    """Read weights, check them against the network, fit the detector, measure clean accuracy, package and register.

    Returns:
        The version, and its figures on the test set.

    Raises:
        UserError: The file, the data or the server is missing, or they do not fit together.
    """
    path = Path(settings.file).expanduser()
    weights = read_state_dict(path)
    dataset = load_dataset(settings.data)
    network = build_model(
        settings.model.name, len(dataset.class_names), dataset.image_shape, settings.model.normalization
    )
    network.load_state_dict(fitted_state_dict(weights, network, settings.file))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device).eval()
    config = RunConfig.model_validate(
        {
            "seed": settings.seed,
            "data": settings.data.model_dump(),
            "model": settings.model.model_dump(),
            "attack": {"norm": settings.norm, "epsilon": settings.radius, "step_size": settings.radius / 4},
            "detection": settings.detection.model_dump(),
        }
    )
    rows = torch.arange(len(dataset.test))
    alone = WorkerContext(device=device)
    batches = EvaluationBatches(dataset.test, rows, alone, batch_size=config.evaluation.batch_size)
    measured = measure_accuracy(network, batches, {}, alone, settings.seed)
    figures = {"clean_accuracy": measured["clean_accuracy"]}
    labels, fraction = dataset.train.labels, settings.data.validation_fraction
    train, validation = split_validation(labels, fraction, settings.seed, dataset.class_names)
    arrays = fit_rejector(network, dataset.train, train, validation, config, device)
    facts = {
        FINGERPRINT: dataset.fingerprint,
        "source": settings.source or path.name,
        "note": "the validation images may be among those it was trained on",
    }
    uri = tracking_uri(settings.tracking)
    made = client(uri)
    with path.open("rb") as file:
        key = f"import/{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
    run_id = retrying("Opening the run", lambda: _open_run(made, settings, uri, key, facts))
    made.log_metric(run_id, "test/clean_accuracy", figures["clean_accuracy"])
    packaged = log_model(
        uri,
        run_id,
        state_dict=network.cpu().state_dict(),
        config=config,
        class_names=dataset.class_names,
        image_shape=dataset.image_shape,
        example=dataset.test.fetch(rows[:4]).float().div(255).numpy(),
        metrics=figures,
        registered_model=settings.name or f"tla-{settings.data.name.replace('_', '-')}",
        facts=facts,
        rejector=Rejector.from_arrays(arrays) if arrays else None,
        method=METHOD,
    )
    made.set_terminated(run_id, "FINISHED")
    return packaged, figures


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name; nothing in it is run.

    Args:
        path: ``.safetensors``, or anything that ``torch.load`` reads with ``weights_only=True``.

    Raises:
        UnavailableError: There is no such file, it is damaged, or it holds more than weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UnavailableError("file", path, "there is no such file", "give the weights' file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "holds more than weights, and loading it would run code"
        remedy = "where it comes from, save its state_dict alone, best as .safetensors"
        raise UnavailableError("file", path, reason, remedy) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise UnavailableError("file", path, f"cannot be read ({one_line(error)})", "fetch it again") from error
    while isinstance(loaded, Mapping) and not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        inner = next((loaded[name] for name in _HOLDERS if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping):
        raise UnavailableError("file", path, "holds no state dict", "save a network's state_dict()")
    return {str(name): value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def fitted_state_dict(
    weights: Mapping[str, torch.Tensor], network: torch.nn.Module, source: str
) -> dict[str, torch.Tensor]:
    """Weights under the names of a network, after checking that each has its place.

    Prefixes of wrappers (``module.``, ``model.``, ...) are dropped, and so is a block that TRADES' networks carry and
    never use. A normalisation that is stored as tensors must be the network's own.

    Raises:
        ConfigError: Some are missing, left over, of other shapes, or the normalisation is another.
    """
    wanted = network.state_dict()
    found = dict(weights)
    while not set(wanted) <= set(found):
        prefix = next((prefix for prefix in _PREFIXES if _most_have(found, prefix)), None)
        if prefix is None:
            break
        found = {name.removeprefix(prefix): value for name, value in found.items()}
    normalization = {name: found.pop(name) for name in list(found) if name.rpartition(".")[2] in _NORMALIZATION}
    found = {name: value for name, value in found.items() if not name.startswith(_UNUSED)}
    # Networks of before 2018 have no such counters; nothing in eval mode reads them.
    for name, value in wanted.items():
        if name.endswith("num_batches_tracked"):
            found.setdefault(name, value)
    problems = [f"{name} is missing" for name in wanted if name not in found]
    problems += [f"{name} has no place" for name in found if name not in wanted]
    problems += [
        f"{name} is {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        remedy = "choose model.name and data so that the network is theirs"
        raise ConfigError("file", source, f"are not this network's weights ({problems[0]}{more})", remedy)
    _check_normalization(normalization, network, source)
    return found


def _most_have(weights: Mapping[str, torch.Tensor], prefix: str) -> bool:
    return 2 * sum(name.startswith(prefix) for name in weights) > len(weights)


def _check_normalization(stored: Mapping[str, torch.Tensor], network: torch.nn.Module, source: str) -> None:
    own = getattr(network, "normalization", None)
    for name, value in stored.items():
        mine: Any = getattr(own, _NORMALIZATION[name.rpartition(".")[2]], None)
        is_alike = isinstance(mine, torch.Tensor) and mine.numel() == value.numel()
        if not (is_alike and torch.allclose(mine.flatten().float(), value.flatten().float(), atol=1e-3)):
            reason = f"carry a normalisation, {name} = {[round(number, 4) for number in value.flatten().tolist()]}"
            remedy = "choose the model.normalization that has it"
            raise ConfigError("file", source, f"{reason}, that is not the network's", remedy)


def _open_run(made: "MlflowClient", settings: ImportSettings, uri: str, key: str, facts: Mapping[str, str]) -> str:
    """The run of an import; the same file goes to the same run."""
    experiment = experiment_id(made, settings.tracking.experiment, uri)
    runs = made.search_runs([experiment], f"tags.`{RUN_KEY}` = '{key}'", max_results=1)
    if runs:
        return str(runs[0].info.run_id)
    tags = {f"tla.{name}": value for name, value in facts.items()}
    tags |= code_version() | {RUN_KEY: key, "tla.method": METHOD}
    return str(made.create_run(experiment, run_name=key, tags=tags).info.run_id)
