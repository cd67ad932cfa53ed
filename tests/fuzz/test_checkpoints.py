"""Damaged checkpoints, model versions and files of weights.

What must not be accepted: a checkpoint or a packaged model of which any byte differs, where a manifest has its SHA-256
(the manifest of a checkpoint itself may differ where it means the same). Where the manifest was rewritten to match, or
there is none, nobody can tell that a weight was changed; then only one thing is required: a model, or one message.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.fuzz.harness import Faults, chunks, mutated, random_of, run_case
from tests.registry.tracking_server import Packaged
from tests.training.conftest import KeepingReporter, digits_config, fit
from tla_service.files import sha256
from tla_service.models import build_model
from tla_service.models import weights as published
from tla_service.registry.integrity import write_manifest
from tla_service.registry.subject import load_subject
from tla_service.runtime import WorkerContext
from tla_service.training.checkpoint import MANIFEST
from tla_service.training.fit import Run

pytestmark = pytest.mark.fuzz  # a package to damage takes seconds to make
COUNT = 300
CONFIG = digits_config(training={"epochs": 1, "ema_decay": 0.9})
READ = ("best.safetensors", "config.yaml", "data.json")  # of a checkpoint, when its model is evaluated
KINDS = ["gone", "folder", "link", "loop", "pickle", "code", "name"]  # of odd files; MLflow copies what is in its store
JSON = [None, True, -1, 10**400, 1e308, "", "\x00", "x" * 10_000, "../../../etc/passwd", [], [[]], {}, {"a": 1}, "NaN"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint within an epoch, with best weights as well."""
    reporter = KeepingReporter(tmp_path_factory.mktemp("checkpoint"))
    fit(CONFIG, WorkerContext(), reporter)
    return reporter.checkpoints[-1]


@pytest.fixture(scope="module")
def packaged(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    path.write_bytes(template.read_bytes())
    return Packaged(f"sqlite:///{path}")


def wrong_json(rng: random.Random, content: bytes) -> bytes:
    """A JSON document, one of whose values is gone, given twice, or of another kind."""
    whole = json.loads(content)
    parents = list(containers(whole))
    parent = rng.choice(parents[:1] * 3 + parents)
    key = rng.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
    kind = rng.choice(["remove", "replace", "replace", "root", "text", "deep"])
    if kind == "remove":
        del parent[key]
    elif kind == "replace":
        parent[key] = rng.choice(JSON)
    elif kind == "root":
        whole = rng.choice(JSON)
    text = json.dumps(whole)
    if kind == "deep":
        text = "[" * 100_000
    return (text[:-1] + ', "weights": NaN}' if kind == "text" and text.endswith("}") else text).encode()


def containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list) and value:
        yield value
        for each in value.values() if isinstance(value, dict) else value:
            yield from containers(each)


def odd_folder(rng: random.Random, folder: Path, kinds: list[str]) -> str:
    """A folder with something else in it than files that were written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path, kind = rng.choice(files), rng.choice(kinds)
    if kind in ("pickle", "code", "name"):
        name = {"pickle": "x.pkl", "code": "sitecustomize.py", "name": "a\nb\x1b[31m"}[kind]
        (path.parent / name).write_bytes(b"print(1)")
        return f"added: {kind}"
    path.rename(folder.parent / "aside")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind != "gone":
        path.symlink_to({"link": folder.parent / "aside", "loop": path, "zero": Path("/dev/zero")}[kind])
    return f"{path.name}: {kind}"


def damage(rng: random.Random, folder: Path, seal: Callable[[Path], object] | None, kinds: list[str]) -> str:
    """Damage a file of a folder; with `seal`, so that its manifest does not tell."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice([path for path in files if path.suffix != ".py" or rng.random() < 0.1])
    if seal is None and rng.random() < 0.2:
        return odd_folder(rng, folder, kinds)
    if path.suffix == ".json" and rng.random() < 0.7:
        what, content = "json", wrong_json(rng, path.read_bytes())
    else:
        what, content = mutated(rng, path.read_bytes())
    if content == path.read_bytes():
        content += b"x"
    path.write_bytes(content)
    if seal is not None and path.name != MANIFEST:
        seal(folder)
    return f"{path.relative_to(folder)}: {what}{', sealed' if seal else ''}"


def seal_checkpoint(folder: Path) -> None:
    checksums = {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps(checksums))


def means_the_same(folder: Path, original: Path, names: Collection[str] = ()) -> bool:
    """Whether all files, or those that are read, and what the manifest says of them are as they were."""
    every = [str(path.relative_to(original)) for path in original.rglob("*") if path.is_file()]
    names = names or [name for name in every if name != MANIFEST]
    if not all((folder / name).is_file() for name in [*names, MANIFEST]):
        return False
    try:
        manifests = [dict(json.loads((each / MANIFEST).read_text())) for each in (folder, original)]
    except (ValueError, TypeError, RecursionError):
        return False
    said = [[manifest.get(name) for name in names] for manifest in manifests]
    return said[0] == said[1] and all((folder / n).read_bytes() == (original / n).read_bytes() for n in names)


def resume(folder: Path) -> None:
    Run(CONFIG, WorkerContext(), KeepingReporter(folder.parent, resume_from=folder)).start(None)


def weights_file(rng: random.Random, folder: Path) -> str:
    """A damaged file of weights, or a well-formed one with wrong ones."""
    path, network = folder / "x.safetensors", build_model("digits_cnn", 10, (1, 8, 8))
    state = {name: value.clone() for name, value in network.state_dict().items()}
    kind = rng.choice(
        ["bytes", "bytes", "torch", "torch", "nan", "shape", "type", "missing", "header", "length", "objects"]
    )
    first = next(name for name, value in state.items() if value.is_floating_point())
    if kind == "nan":
        state[first].view(-1)[0] = rng.choice([float("nan"), float("inf")])
    elif kind == "shape":
        state[first] = state[first].flatten()
    elif kind == "type":
        state[first] = state[first].to(rng.choice([torch.int64, torch.bool]))
    elif kind == "missing":
        del state[first]
    if kind in ("torch", "objects"):
        path = folder / "x.pt"
        torch.save({"a": folder} if kind == "objects" else state, path)
    else:
        save_file(state, path)
    content = path.read_bytes()
    if kind in ("bytes", "torch"):
        what, content = mutated(rng, content)
        kind = f"may pass: {kind} {what}"
    elif kind == "length":
        content = rng.choice([2**63, 2**32, len(content), 0]).to_bytes(8, "little") + content[8:]
    elif kind == "header":
        size = int.from_bytes(content[:8], "little")
        header = wrong_json(rng, content[8 : 8 + size])
        content = len(header).to_bytes(8, "little") + header + content[8 + size :]
        kind = "may pass: header"  # another type of the same size, or metadata
    path.write_bytes(content)
    return f"{path.name} {kind}"


def import_file(folder: Path) -> None:
    path = next(folder.iterdir())
    published.fit(published.read_entries(path), build_model("digits_cnn", 10, (1, 8, 8)), str(path))


@chunks(COUNT, 5)
def test_damaged_checkpoints_and_models_are_refused(
    numbers: range, checkpoint: Path, packaged: Packaged, tmp_path: Path
) -> None:
    home = next(Path(packaged.uri.removeprefix("sqlite:///")).parent.rglob("MLmodel")).parent
    stored = shutil.copytree(home, tmp_path / "stored")
    folder = tmp_path / "folder"
    with Faults() as faults:
        for number in numbers:
            rng = random_of("checkpoint", number)
            kind = rng.choice(["resume", "evaluate", "version", "package", "file"])
            sealed = kind != "version" and rng.random() < 0.4
            what, accepted = "", False
            if kind == "file":
                folder.mkdir()
                what = weights_file(rng, folder)
                ended, accepted = run_case(partial(import_file, folder)), "may pass" in what
            elif kind in ("resume", "evaluate"):
                shutil.copytree(checkpoint, folder)
                what = damage(rng, folder, seal_checkpoint if sealed else None, [*KINDS, "pipe", "zero"])
                accepted = sealed or means_the_same(folder, checkpoint, READ if kind == "evaluate" else ())
                load = partial(load_subject, str(folder), "model", packaged.uri)
                ended = run_case(partial(resume, folder) if kind == "resume" else load)
            else:
                shutil.copytree(stored, folder)
                what = damage(
                    rng,
                    folder,
                    write_manifest if sealed else None,
                    KINDS if kind == "version" else [*KINDS, "pipe", "zero"],
                )
                accepted = sealed or (
                    kind == "package" and not what.startswith("added") and means_the_same(folder, stored)
                )
                address = str(folder)
                if kind == "version":  # in the store
                    home.rename(tmp_path / "whole")
                    shutil.copytree(folder, home, symlinks=True)
                    address = packaged.model.model_uri
                ended = run_case(partial(load_subject, address, "model", packaged.uri))
                if kind == "version":
                    shutil.rmtree(home)
                    (tmp_path / "whole").rename(home)
            passed = ended.code is None and not ended.text and accepted
            faults.add(ended.excess if passed else ended.fault, number, (kind, what), ended)
            shutil.rmtree(folder)
            (tmp_path / "aside").unlink(missing_ok=True)


def test_whole_ones_are_accepted(checkpoint: Path, packaged: Packaged) -> None:
    assert run_case(partial(resume, checkpoint)).code is None
    for address in (str(checkpoint), packaged.model.model_uri):
        ended = run_case(partial(load_subject, address, "model", packaged.uri))
        assert (ended.code, ended.text) == (None, "")
