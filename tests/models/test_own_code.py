"""Factories from outside the package: found, refused in one line, and never mixed up."""

import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from ray import cloudpickle

from tla_service.errors import ConfigError, UnavailableError, UserError
from tla_service.models import Architecture
from tla_service.models.own_code import code_requirements, distribution, pack

OWN = Path(__file__).with_name("own_network")
PLAIN = """
from torch import nn
def build(num_classes, image_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear({pixels}, {width}), nn.ReLU(), nn.Linear({width}, num_classes))
"""


def folder_with(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, text in files.items():
        (path / f"{name}.py").write_text(text)
    return path


def build(folder: Path, name: str = "network:build") -> torch.nn.Module:
    return Architecture(name, code=pack(str(folder))).build(10, (1, 8, 8))


def test_a_network_of_two_files_is_built_and_leaves_no_trace() -> None:
    before = list(sys.path), set(sys.modules)
    network = build(OWN)
    assert network(torch.rand(2, 1, 8, 8)).embeddings.shape == (2, 32)
    assert sys.path == before[0]
    assert not {"network", "layers"} & set(sys.modules)
    assert not list(OWN.rglob("__pycache__"))


def test_the_documentation_shows_the_files() -> None:
    page = (Path(__file__).parents[2] / "docs" / "networks.md").read_text()
    assert all(f"```python\n{(OWN / name).read_text()}```" in page for name in ("network.py", "layers.py"))


def test_modules_of_the_same_name_do_not_mix(tmp_path: Path) -> None:
    folders = [
        folder_with(
            tmp_path / str(width), network="from parts import build", parts=PLAIN.format(pixels=64, width=width)
        )
        for width in (5, 7)
    ]
    sizes = [build(folder).embedding_size for folder in [*folders, *folders]]
    assert sizes == [5, 7, 5, 7]


def test_a_module_of_the_process_comes_back(tmp_path: Path) -> None:
    """The folder has a module `tests`, as this process has."""
    import tests

    folder = folder_with(
        tmp_path / "code", network="import tests\nbuild = tests.build", tests=PLAIN.format(pixels=64, width=3)
    )
    assert build(folder).embedding_size == 3
    assert sys.modules["tests"] is tests
    assert sys.modules[__name__].__name__ == __name__


def test_a_process_without_the_code_gets_the_network_by_value() -> None:
    """As Ray sends it to the tasks of an evaluation."""
    network, images = build(OWN).eval(), torch.rand(2, 1, 8, 8)
    assert not {"network", "layers"} & set(sys.modules)
    received = pickle.loads(cloudpickle.dumps(network))
    assert torch.equal(received(images).logits, network(images).logits)


def test_an_archive_depends_on_names_and_contents_alone(tmp_path: Path) -> None:
    first = pack(str(OWN))
    moved = shutil.copytree(OWN, tmp_path / "elsewhere" / "code")
    (moved / "__pycache__").mkdir()
    (moved / "__pycache__" / "layers.cpython-311.pyc").write_bytes(b"cache")
    (moved / ".git").mkdir()
    (moved / ".git" / "HEAD").write_text("ref")
    (moved / "network.py").touch()
    assert pack(str(moved)) == first
    (moved / "layers.py").write_text((moved / "layers.py").read_text() + "# changed\n")
    assert pack(str(moved)) != first


def test_an_architecture_pickles_with_its_code() -> None:
    architecture = pickle.loads(pickle.dumps(Architecture("network:build", code=pack(str(OWN)))))
    assert architecture.build(10, (1, 8, 8)).embedding_size == 32


def test_an_installed_factory_is_pinned_and_another_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import version

    assert distribution("torchvision.models:resnet18") == f"torchvision=={version('torchvision')}"
    folder_with(tmp_path / "loose", loose_network=PLAIN.format(pixels=64, width=4))
    monkeypatch.syspath_prepend(tmp_path / "loose")
    architecture = Architecture("loose_network:build")
    assert architecture.build(10, (1, 8, 8)).embedding_size == 4
    with pytest.raises(ConfigError, match=r"model.name=loose_network:build: .*set model.code to the folder"):
        architecture.requirements()
    # This package itself is an editable installation, which no index has.
    with pytest.raises(ConfigError, match="was not installed from a package index"):
        distribution("tla_service.models:build_model")


def test_requirements_of_the_code() -> None:
    def archive(folder: Path, text: str) -> bytes:
        folder.mkdir(exist_ok=True)
        (folder / "requirements.txt").write_text(text)
        return pack(str(folder))

    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        lines = "# ours\neinops==0.8.1  # shapes\n\npack[extra]>=2\nother @ https://example.org/other.whl\nplain\n"
        found = code_requirements(archive(Path(scratch), lines))
        assert found == ["einops==0.8.1", "pack[extra]>=2", "other @ https://example.org/other.whl", "plain"]
        for wrong in ("-r others.txt", "--index-url x", "./local", "two words"):
            with pytest.raises(ConfigError, match="is no requirement of a package"):
                code_requirements(archive(Path(scratch), wrong))
    assert code_requirements(pack(str(OWN))) == []


BAD_MODULES: dict[str, tuple[str, type[UserError], str]] = {
    "syntax": ("def build(:", ConfigError, r"does not import: SyntaxError: .*\(network.py, line 1\)"),
    "raises on import": ("1 / 0", ConfigError, r"does not import: ZeroDivisionError: .*\(network.py, line 1\)"),
    "exits on import": ("raise SystemExit(3)", ConfigError, "does not import: SystemExit"),
    "imports what is missing": ("import not_there", UnavailableError, "imports not_there, which is not there"),
    "no such function": ("built = 1", ConfigError, "network has no function build; define it as factory"),
    "not a function": ("build = 1", ConfigError, "network has no function build"),
    "fails": (
        "\ndef build(k, s):\n    return k.x",
        ConfigError,
        r"the factory failed: AttributeError.*network.py, line 3",
    ),
    "lazy and fails forward": (
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.head = nn.LazyLinear(10)\n    def forward(self, x):\n        return self.head(x).missing\n"
        "def build(k, s): return Net()",
        ConfigError,
        r"fails on 1x8x8 images \(AttributeError: .*\(network.py, line 7\)\); correct its forward method",
    ),
    "other arguments": ("def build(k): pass", ConfigError, "the factory failed: TypeError"),
    "no module": ("def build(k, s): return 1", ConfigError, "returned int, not a torch.nn.Module"),
    "no parameters": (
        "from torch import nn\ndef build(k, s): return nn.Flatten()",
        ConfigError,
        "no parameters to train",
    ),
}


@pytest.mark.parametrize(("text", "kind", "reason"), BAD_MODULES.values(), ids=BAD_MODULES.keys())
def test_bad_modules(tmp_path: Path, text: str, kind: type[UserError], reason: str) -> None:
    with pytest.raises(kind, match=f"model.name=network:build: .*{reason}") as caught:
        build(folder_with(tmp_path / "code", network=text))
    assert "\n" not in str(caught.value)
    assert type(caught.value) is kind


@pytest.mark.parametrize("name", ["other:build", "package.network:build", "json:loads"])
def test_a_module_that_is_not_in_the_folder_is_missing(name: str) -> None:
    with pytest.raises(UnavailableError, match=r"model\.code"):
        build(OWN, name)


def test_a_module_that_is_not_installed_is_missing() -> None:
    with pytest.raises(UnavailableError, match=r"the module not_installed is not installed; set model\.code"):
        Architecture("not_installed:build").build(10, (1, 8, 8))


@pytest.mark.parametrize("name", ["a:b:c", "a b:c", ":c", "a:", "a.:b", "timm", "torchvision:"])
def test_names_that_have_no_such_form(name: str) -> None:
    with pytest.raises(ConfigError, match="there is no such network"):
        Architecture(name).build(10, (1, 8, 8))


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="there is no such folder"):
        pack(str(tmp_path / "nowhere"))
    with pytest.raises(UnavailableError, match=r"model\.code=~nosuchuser: cannot be read .*; give a folder"):
        pack("~nosuchuser")
    with pytest.raises(UnavailableError, match=r"cannot be read \(UnicodeEncodeError.*names in UTF-8"):
        pack(str(folder_with(tmp_path / "latin", **{os.fsdecode(b"x\xe9"): ""})))
    pickled = folder_with(tmp_path / "pickled", network="")
    (pickled / "weights").mkdir()
    (pickled / "weights" / "best.txt").write_bytes(pickle.dumps(Path))
    with pytest.raises(ConfigError, match=r"weights/best\.txt is or contains a pickle"):
        pack(str(pickled))
    linked = folder_with(tmp_path / "linked", network="")
    (linked / "layers.py").symlink_to(OWN / "layers.py")
    with pytest.raises(ConfigError, match=r"layers\.py is a symbolic link"):
        pack(str(linked))
    with pytest.raises(ConfigError, match="its module random hides another one"):
        pack(str(folder_with(tmp_path / "hiding", network="", random="")))
    large = folder_with(tmp_path / "large", network="")
    with (large / "data.raw").open("wb") as file:
        file.truncate(50_000_001)
    with pytest.raises(ConfigError, match="larger than 50 MB"):
        pack(str(large))
