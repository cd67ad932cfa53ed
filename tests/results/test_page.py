"""The page: our figures from the runs alone, what is missing with its command, and a reading that follows them."""

from collections.abc import Callable
from pathlib import Path

from tests.results.conftest import settings_of
from tla_service.results.page import write_page
from tla_service.results.runs import table_runs, table_space

Finished = Callable[..., None]


def page_of(tmp_path: Path, *flags: str) -> str:
    output = ("--state", str(tmp_path / "state"), "--output", str(tmp_path / "page.md"))
    settings = settings_of("--table", "mnist", "--data.root", "/data", *output, *flags)
    space = table_space(settings, table_runs(settings))
    return write_page(settings, space, tmp_path / "state", tmp_path / "state").read_text()


def test_without_runs_every_cell_is_empty_and_the_command_is_there(tmp_path: Path) -> None:
    page = page_of(tmp_path)
    assert "18 runs: `natural-s0`" in page  # 6 methods, 3 seeds each
    assert "python jobs/reproduce_paper.py --table mnist --seeds 3 --data.root /data/mnist" in page
    assert "96.79" not in page


def test_the_papers_figures_are_never_in_our_rows(tmp_path: Path, finished: Finished) -> None:
    finished(tmp_path / "state", "tla-s0", 0.9, 0.5)
    page = page_of(tmp_path)
    accuracy = page.partition("## Accuracy")[2].partition("## ")[0]
    rows = {line.split("|")[1].strip(): line for line in accuracy.splitlines() if line.startswith("| ")}
    assert "99.52" in rows["*TLA, paper*"]
    assert [cell.strip() for cell in rows["TLA"].split("|")[2:6]] == ["1", "90.0", "50.0", "45.0"]
    assert rows["AT"].replace("|", "").split() == ["AT", "0"]
    assert "99.52" not in rows["TLA"]
    assert (tmp_path / "pictures" / "mnist-methods.png").stat().st_size > 1000
    assert "1000 test images, the paper's 10000" in page


def test_the_modern_recipe_has_a_page_without_the_papers_figures(tmp_path: Path, finished: Finished) -> None:
    finished(tmp_path / "state", "tla-s0", 0.9, 0.5)
    page = page_of(tmp_path, "--recipe", "modern")
    assert "| TRADES | 0 |" in page
    assert "paper*" not in page
    assert "`python jobs/reproduce_paper.py --table mnist --seeds 3 --recipe modern --data.root /data/mnist`" in page
    assert (tmp_path / "pictures" / "mnist-modern-methods.png").exists()


def test_reduced_settings_stand_without_the_papers(tmp_path: Path, finished: Finished) -> None:
    finished(tmp_path / "state", "tla-s0", 0.9, 0.5)
    page = page_of(tmp_path, "--budget", "30")
    assert "**Reduced settings**" in page
    assert "108 steps of 256 images" in page
    assert "*TLA, paper*" not in page


def test_the_reading_follows_the_intervals(tmp_path: Path, finished: Finished) -> None:
    for seed in range(3):
        finished(tmp_path / "state", f"tla-s{seed}", 0.90 + 0.001 * seed, 0.70 + 0.001 * seed)
        finished(tmp_path / "state", f"at-s{seed}", 0.95 + 0.002 * seed, 0.60 + 0.002 * seed)
        finished(tmp_path / "state", f"alp-s{seed}", 0.90 + 0.03 * seed, 0.75 - 0.04 * seed)
    page = page_of(tmp_path)
    lines = {label: next(line for line in page.splitlines() if line.startswith(f"- TLA minus {label}"))
             for label in ("AT", "ALP")}  # fmt: skip
    assert "clean -5.1 [-5.3, -4.9] **worse**" in lines["AT"]
    assert "pgd100 +9.9 [+9.7, +10.1] **better**" in lines["AT"]
    assert "3 shared seeds" in lines["AT"]
    assert lines["ALP"].count("not separated") >= 3


def test_figures_state_how_many_seeds_they_are_of(tmp_path: Path, finished: Finished) -> None:
    for seed in range(3):
        finished(tmp_path / "state", f"tla-s{seed}", 0.9, 0.5, attacks_only=seed > 1)
    page = page_of(tmp_path)
    accuracy, representation = (line for line in page.splitlines() if line.startswith("| TLA |"))
    assert accuracy.startswith("| TLA | 3, autoattack 2 | 90.0 ")
    assert representation.startswith("| TLA | 2 | 80.0 ")


def test_what_the_first_run_lacks_is_shown_of_the_others(tmp_path: Path, finished: Finished) -> None:
    finished(tmp_path / "state", "at-s0", 0.9, 0.5, attacks_only=True)
    finished(tmp_path / "state", "at-s1", 0.9, 0.5, transfer=0.75)
    page = page_of(tmp_path)
    assert "| method | seeds | clean | pgd100 | transfer_pgd100 | autoattack |" in page
    accuracy, representation = (line for line in page.splitlines() if line.startswith("| AT |"))
    cells = "| AT | 2, transfer_pgd100 1, autoattack 1 | 90.0 [90.0, 90.0] | 50.0 [50.0, 50.0] | 75.0 | 45.0 |"
    assert accuracy == cells
    assert representation.startswith("| AT | 1 | 80.0 ")


def test_warnings_of_autoattack_are_on_the_page(tmp_path: Path, finished: Finished) -> None:
    finished(tmp_path / "state", "at-s0", 0.9, 0.5)
    assert "AutoAttack warns" not in page_of(tmp_path)
    for name in ("tla-s0", "tla-s1"):
        finished(tmp_path / "state", name, 0.9, 0.5, warnings=["it seems random"])
    assert "AutoAttack warns about `tla-s0`, `tla-s1`: it seems random." in page_of(tmp_path)


def test_equal_differences_over_seeds_separate_nothing(tmp_path: Path, finished: Finished) -> None:
    for seed in range(2):
        finished(tmp_path / "state", f"tla-s{seed}", 0.90, 0.70 + 0.01 * seed)
        finished(tmp_path / "state", f"at-s{seed}", 0.90, 0.68 + 0.01 * seed)
    (line,) = (line for line in page_of(tmp_path).splitlines() if line.startswith("- TLA minus AT"))
    assert "pgd100 +2.0 [+2.0, +2.0] not separated (equal at every seed)" in line
    assert "better" not in line


def test_methods_without_a_shared_seed_are_not_compared(tmp_path: Path, finished: Finished) -> None:
    finished(tmp_path / "state", "tla-s0", 0.9, 0.7)
    finished(tmp_path / "state", "at-s1", 0.9, 0.6)
    assert "There is no baseline to compare TLA with yet." in page_of(tmp_path)
