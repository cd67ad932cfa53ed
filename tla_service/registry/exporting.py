"""Exports models as torch.export's ``pt2`` and as ONNX, and compares each with the network."""

import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch

from tla_service.data.cache import disk_trouble
from tla_service.errors import ConfigError, UnavailableError
from tla_service.files import expanded
from tla_service.inference.predictor import Predictor
from tla_service.registry.job_settings import Format
from tla_service.registry.loading import open_package

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_BATCHES = (1, 2, 7)  # sizes to compare: the example's, others, and a single image
_TOLERANCE = 1e-4  # float32 additions in another order, relative to the largest output
_DESCRIPTION = ("model.json", "model_card.md", "detector.safetensors")
_OUTPUTS = ("logits", "embeddings")
Run = Callable[[torch.Tensor], Sequence[torch.Tensor]]


def export_model(uri: str, folder: Path, formats: Sequence[Format], tracking: str | None = None) -> dict[Path, float]:
    """Write a packaged model in other formats, and compare their outputs with the network's.

    Each takes images (N, C, H, W), float32 in [0, 1], with dynamic N, and returns logits and embeddings. Description,
    model card and detector are copied to the same folder, in place of another model's; RuntimeError, and the folder
    stays as it was, if a file computes something else. Returns the files, each with the largest difference of its
    outputs, relative to the largest output.
    """
    artifacts, description = open_package(uri, tracking)
    network = Predictor.load(artifacts, "cpu").network
    shape = tuple(description["image_shape"])
    folder = expanded("output", folder)
    if folder.resolve() == artifacts.resolve():
        raise ConfigError("output", folder, "is the folder of the model itself", "choose another --output")
    with disk_trouble("output", folder, "choose another --output"):
        folder.mkdir(parents=True, exist_ok=True)
    example = torch.rand(2, *shape)  # torch.export would treat a batch size of 1 as a constant
    batches = {"images": {0: torch.export.Dim.AUTO}}
    program = torch.export.export(_Plain(network).eval(), (example,), dynamic_shapes=batches)
    program.example_inputs = None  # torch.export.save would pickle them
    writers = {"pt2": _write_pt2, "onnx": _write_onnx}
    found = {}
    with disk_trouble("output", folder, "choose another --output"), tempfile.TemporaryDirectory(dir=folder) as made:
        for kind in formats:
            path = Path(made, f"model.{kind}")
            run = writers[kind](program, path)
            with torch.inference_mode():
                difference = _compare(run, network, shape)
            if not difference <= _TOLERANCE:
                raise RuntimeError(f"{path.name} differs from the network by {difference:.2g} of its largest output")
            found[folder / path.name] = difference
        for name in (*_DESCRIPTION, *(f"model.{kind}" for kind in get_args(Format))):
            (folder / name).unlink(missing_ok=True)  # of another model, maybe
        for path in found:
            Path(made, path.name).replace(path)
        for name in _DESCRIPTION:
            if (artifacts / name).is_file():
                shutil.copy(artifacts / name, folder / name)
    return found


class _Plain(torch.nn.Module):
    """Returns a plain tuple: loading an exported file must not need a class of this project."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, K) and embeddings (N, D)."""
        output = self.network(images)
        return output.logits, output.embeddings


def _write_pt2(program: "ExportedProgram", path: Path) -> Run:
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _write_onnx(program: "ExportedProgram", path: Path) -> Run:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        remedy = "pip install 'tla-service[export]', or leave onnx out of --formats"
        raise UnavailableError("formats", "onnx", f"a package is missing ({error.name})", remedy) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.onnx warns about its own internals
        made = torch.onnx.export(program, verbose=False, output_names=list(_OUTPUTS), optimize=True)
    assert made is not None
    made.save(str(path), external_data=False)
    session: Any = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: [torch.from_numpy(each) for each in session.run(list(_OUTPUTS), {name: images.numpy()})]


def _compare(run: Run, network: torch.nn.Module, shape: tuple[int, ...]) -> float:
    """The largest difference relative to the largest output; NaN if there is one."""
    random = torch.Generator().manual_seed(0)
    differences = []
    for size in _BATCHES:
        images = torch.rand(size, *shape, generator=random)
        for found, wanted in zip(run(images), network(images), strict=True):
            if found.shape != wanted.shape:
                return float("inf")
            differences.append((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12))
    return float(torch.stack(differences).max())
