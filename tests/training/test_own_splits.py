"""A run on folders of images with a validation split of their own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.conftest import encoded
from tests.training.conftest import KeepingReporter, digits_config, fit
from tla_service.config import RunConfig
from tla_service.errors import ConfigError
from tla_service.inference.detector import Rejector
from tla_service.runtime import WorkerContext
from tla_service.training.fit import Run
from tla_service.training.output import open_output, write_config, write_summary
from tla_service.training.validation import ImageSet


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of noise around a grey level, 40 training, 10 validation and 8 test images."""
    draws = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 10), ("test", 8)):
        for number in range(count):
            path = tmp_path / "root" / split / ("dark", "light")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            low = 128 * (number % 2)
            path.write_bytes(encoded(draws.integers(low, low + 128, (8, 8), np.uint8)))
    return tmp_path / "root"


def config_for(root: Path, **data: Any) -> RunConfig:
    data = {"name": "image_folder", "root": str(root), "image_size": 8, "train_limit": None, "test_limit": None, **data}
    training = {"epochs": 2, "global_batch_size": 10}
    return digits_config(data={**data, "cache_dir": str(root.parent / "cache")}, training=training)


def test_the_split_is_what_is_validated_on(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reporter = KeepingReporter(tmp_path)
    run = Run(config_for(root), WorkerContext(), reporter)
    seen: list[int] = []
    measure = ImageSet.measure

    def measured(images: ImageSet, *rest: Any) -> dict[str, float]:
        assert images.source in (run.dataset.validation, run.dataset.test)
        seen.append(len(images.rows))
        return measure(images, *rest)

    monkeypatch.setattr(ImageSet, "measure", measured)
    run.start(None)
    result = run.train(with_rejector=True)
    assert seen == [10, 10, 8]
    assert (result.facts["training_images"], result.facts["validation_images"]) == ("40", "10")
    assert Rejector.from_arrays(result.rejector).validation_images == 10


def test_a_run_that_held_its_validation_images_out_goes_on_so_only_when_told(root: Path, tmp_path: Path) -> None:
    """As runs of earlier versions did, whatever splits there were."""
    earlier, later = config_for(root, validation=""), config_for(root)
    assert earlier.run_name == later.run_name
    first = KeepingReporter(tmp_path)
    assert fit(earlier, WorkerContext(), first).facts["training_images"] == "36"
    with pytest.raises(ConfigError, match=r'data\.validation: this run began with .* held out .*; set it to "", or'):
        fit(later, WorkerContext(), KeepingReporter(tmp_path / "b", resume_from=first.checkpoints[0]))
    resumed = KeepingReporter(tmp_path / "c", resume_from=first.checkpoints[0])
    fit(earlier, WorkerContext(), resumed)
    weights = [path.checkpoints[-1] / "model.safetensors" for path in (first, resumed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_run_goes_on_with_the_same_validation_images_only(root: Path, tmp_path: Path) -> None:
    first = KeepingReporter(tmp_path)
    fit(config_for(root), WorkerContext(), first)
    changed = next((root / "val" / "dark").iterdir())
    for validation, named in (("", "data.validation="), (None, "data.validation")):
        with pytest.raises(ConfigError, match=f"{named}: the validation images are not those that this run began"):
            fit(
                config_for(root, validation=validation),
                WorkerContext(),
                KeepingReporter(tmp_path / "b", resume_from=first.checkpoints[0]),
            )
        changed.write_bytes(encoded(np.zeros((8, 8), np.uint8)))


@pytest.mark.parametrize("residencies", [("auto", "stream"), ("stream", "auto")])
def test_a_run_resumes_with_another_residency(root: Path, tmp_path: Path, residencies: tuple[str, str]) -> None:
    began, resumed = (config_for(root, residency=residency, loader_workers=0) for residency in residencies)
    first = KeepingReporter(tmp_path)
    fit(began, WorkerContext(), first)
    assert fit(resumed, WorkerContext(), KeepingReporter(tmp_path / "b", resume_from=first.checkpoints[0])).history
    (root / "val" / "dark" / "0.png").write_bytes((root / "val" / "light" / "1.png").read_bytes())
    with pytest.raises(ConfigError, match=r"data\.validation.*: the validation images are not those"):
        fit(resumed, WorkerContext(), KeepingReporter(tmp_path / "c", resume_from=first.checkpoints[0]))


def test_a_finished_run_was_validated_on_other_images(root: Path, tmp_path: Path) -> None:
    write_config(config_for(root), tmp_path)
    write_summary(tmp_path, {"status": "finished"})
    assert open_output(config_for(root), tmp_path) == {"status": "finished"}
    with pytest.raises(ConfigError, match=r"data\.validation: .* had another data\.validation"):
        open_output(config_for(root, validation=""), tmp_path)
