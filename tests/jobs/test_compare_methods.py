"""The replaced job names the command to use, which is a valid one."""

import shlex

from tests.jobs.conftest import Run
from tla_service.config.loading import read_settings
from tla_service.report.settings import spread_lists
from tla_service.results.settings import ReproduceSettings
from tla_service.tuning.settings import TuneSettings
from tla_service.tuning.space import Space

JOB = "compare_methods"


def new_command(code: int, error: str) -> list[str]:
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("error: compare_methods.py: has been replaced; use: python jobs/")
    return shlex.split(error.partition("jobs/")[2])


def test_digits_are_a_table(run_in_process: Run) -> None:
    flags = ("--preset", "digits", "--seeds", "2", "--methods", "at", "tla", "--output", "x.md", "--side-by-side", "1")
    script, *arguments = new_command(*run_in_process(*flags))
    settings = read_settings(ReproduceSettings, spread_lists(arguments, ("methods",)))
    assert (script, settings.table, settings.seeds) == ("reproduce_paper.py", "digits", 2)
    assert (settings.methods, str(settings.output), settings.side_by_side) == (("at", "tla"), "x.md", 1)


def test_other_presets_are_a_grid(run_in_process: Run) -> None:
    flags = ("--preset", "mnist_small", "--seeds", "2", "--training.epochs", "3", "--data.root", "/data")
    script, *arguments = new_command(*run_in_process(*flags))
    settings = read_settings(TuneSettings, arguments)
    space = Space(settings.run_config, settings.sweep)
    assert (script, settings.training.epochs, settings.sweep.measure_test) == ("tune_tla.py", 3, True)
    assert [(each["method"], each["seed"]) for each in space.grid()][:3] == [
        ("natural", 0), ("natural", 1), ("at", 0),
    ]  # fmt: skip
