"""The documentation agrees with the code: generated tables, links, commands, and the presets' values."""

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pydantic import BaseModel

import tla_service
from benchmarks.settings import BenchmarkSettings
from jobs.inspect_data import InspectSettings
from tla_service.cluster.doctor.settings import CheckupSettings
from tla_service.config import RunConfig
from tla_service.config.fields import parse_fraction
from tla_service.config.loading import JobSettings, RunSettings, preset_names, read_settings
from tla_service.registry.job_settings import ExportSettings, ImportSettings, LeaderboardSettings, PromoteSettings
from tla_service.report.schema import Report
from tla_service.report.settings import EvaluateSettings, ReportSettings, spread_lists
from tla_service.results.settings import ReproduceSettings
from tla_service.tuning.settings import Dimension, SweepConfig, TuneSettings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENTRY = re.compile(r"jobs/\w+\.py|-m benchmarks(?:\.serving)?\b|tla_service\.(?:training|report)\b|\bARGS=")


def commands(page: Path) -> Iterator[str]:
    """Lines of the page's code blocks, continued ones joined, without comments."""
    for block in re.findall(r"^```[a-z]*\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            yield re.sub(r"(^|\s)#.*", "", line).strip()


# What each job reads its command line into; all others read a run's settings.
JOBS: dict[str, type[JobSettings]] = {
    "jobs/doctor.py": CheckupSettings,
    "jobs/evaluate_tla.py": EvaluateSettings,
    "-m tla_service.report": ReportSettings,
    "-m benchmarks": BenchmarkSettings,
    "jobs/tune_tla.py": TuneSettings,
    "jobs/promote_model.py": PromoteSettings,
    "jobs/leaderboard.py": LeaderboardSettings,
    "jobs/export_model.py": ExportSettings,
    "jobs/import_model.py": ImportSettings,
    "jobs/inspect_data.py": InspectSettings,
    "jobs/reproduce_paper.py": ReproduceSettings,
}
OURS = [(page.name, line) for page in PAGES for line in commands(page) if ENTRY.search(line)]


def arguments(line: str) -> list[str]:
    """What a command gives to our program."""
    entry = list(ENTRY.finditer(line))[-1]
    rest = line[entry.end() :]
    return shlex.split(shlex.split(rest)[0]) if entry[0] == "ARGS=" else shlex.split(rest.split(">")[0])


def flags(section: type[BaseModel] = RunSettings, prefix: str = "") -> set[str]:
    """Every flag of the settings."""
    found = set()
    for name, field in section.model_fields.items():
        found |= {f"--{prefix}{name}", f"--no-{prefix}{name}"}
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= flags(field.annotation, f"{prefix}{name}.")
    return found


def settings_of(line: str) -> type[JobSettings]:
    """What a command's job reads."""
    return next((kind for script, kind in JOBS.items() if script in line), RunSettings)


def flags_of_job(line: str) -> set[str]:
    """Flags that a script defines itself."""
    scripts = re.findall(r"jobs/\w+\.py", line) + ["benchmarks/serving.py"] * ("benchmarks.serving" in line)
    return {
        flag for script in scripts for flag in re.findall(r'add_argument\("(--[\w-]+)"', (ROOT / script).read_text())
    }


def test_the_tables_of_settings_are_the_generated_ones() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    generate = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))["page_with_tables"]
    assert page == generate(page), "run: python docs/make_configuration.py"


def test_every_setting_is_in_the_tables() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    for flag in flags():
        name = flag.removeprefix("--")
        if not name.startswith(("no-", "evaluation.validation.")) and name not in RunConfig.model_fields:
            assert f"\n| `{name}` |" in page, name


def test_the_tables_of_a_sweeps_settings_are_the_generated_ones() -> None:
    page = (ROOT / "docs" / "sweeps.md").read_text()
    generate = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))["sweeps_with_tables"]
    assert page == generate(page), "run: python docs/make_configuration.py"
    for name in SweepConfig.model_fields:
        assert f"\n| `sweep.{name}` |" in page, name
    for name in Dimension.model_fields:
        assert f"\n| `{name}` |" in page, name


def test_the_tables_of_an_evaluations_settings_are_the_generated_ones() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    generate = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))["evaluation_with_tables"]
    assert page == generate(page), "run: python docs/make_configuration.py"
    assert "\n| `images.autoattack` |" in page


@pytest.mark.parametrize("study", preset_names("study"))
def test_every_study_is_explained(study: str) -> None:
    assert f"\n| `{study}` |" in (ROOT / "docs" / "sweeps.md").read_text()


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_explained(preset: str) -> None:
    assert f"\n| `{preset}` |" in (ROOT / "docs" / "configuration.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file) if file else page
        assert linked.exists(), target
        if anchor and linked.suffix == ".md":
            headings = re.findall(r"^#+ (.*)", linked.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, (
                target
            )


def test_there_are_commands_to_check() -> None:
    assert {name for name, _ in OURS} >= {"configuration.md", "operations.md"}


READ_ELSEWHERE = "benchmarks.serving|--help"  # commands whose settings no job here reads


@pytest.mark.parametrize(("page", "line"), [(page, line) for page, line in OURS if re.search(READ_ELSEWHERE, line)])
def test_every_flag_of_a_command_exists(page: str, line: str) -> None:
    shown = {argument.split("=")[0] for argument in arguments(line) if argument.startswith("--")}
    assert shown <= flags(settings_of(line)) | flags_of_job(line) | {"--help"}, page


@pytest.mark.parametrize(
    ("page", "line"),
    [(page, line) for page, line in OURS if not re.search(READ_ELSEWHERE, line)],
)
def test_every_command_is_a_valid_configuration(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(line)
    if "--config" in given:  # a file that the reader writes
        place = given.index("--config")
        del given[place : place + 2]
    for name, value in re.findall(r"\b(TLA_\w+)=(\S+)", line[: line.index("python")] if "python" in line else ""):
        monkeypatch.setenv(name, value)
    read_settings(settings_of(line), spread_lists(given, ("compare", "models")))


@pytest.mark.parametrize("preset", preset_names())
def test_a_preset_says_how_it_is_run_and_what_to_expect(preset: str) -> None:
    text = (ROOT / "tla_service" / "config" / "presets" / f"{preset}.yaml").read_text()
    run, expected = re.search(
        r"^# Run: python jobs/train_tla.py (.+)\n# Expect: ((?:.|\n# )+)", text, re.MULTILINE
    ).groups()
    assert read_settings(RunSettings, shlex.split(run)).preset == preset
    found = re.search(r"\((docs/[\w/.-]+), row ([\w-]+)\)", expected)
    if found is None:
        assert expected.startswith("not measured")
        return
    rows = [line for line in (ROOT / found[1]).read_text().splitlines() if re.match(rf"\| `?{found[2]}`? [|(]", line)]
    figures = re.findall(r"\d+\.\d(?: ± \d+\.\d| \[[\d., -]+\])", expected)
    assert figures
    assert any(all(f"| {figure} |" in row for figure in figures) for row in rows)


def differences() -> list[tuple[str, str, str]]:
    """Setting, preset and value as the method's table of differences shows them."""
    text = (
        (ROOT / "docs" / "method.md").read_text().partition("## Where paper and code differ")[2].partition("\n## ")[0]
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    presets = [cell.strip("`") for cell in rows[0][4:]]
    return [
        (row[3].strip("`"), preset, cell)
        for row in rows[2:]
        for preset, cell in zip(presets, row[4:], strict=True)
    ]  # fmt: skip


def test_the_table_of_differences_covers_the_presets_of_paper_and_code() -> None:
    ours = ("modern_", "finetune_")
    others = {
        name for name in preset_names() if name in ("digits", "mnist_small", "cifar10_small") or name.startswith(ours)
    }
    assert {preset for _, preset, _ in differences()} == set(preset_names()) - others


@pytest.mark.parametrize("preset", sorted({preset for _, preset, _ in differences()}))
def test_the_table_of_differences_shows_the_presets_values(preset: str) -> None:
    config = read_settings(RunSettings, ["--preset", preset, "--data.root", "/data"]).run_config.model_dump(mode="json")
    for setting, shown_for, cell in differences():
        if shown_for == preset:
            found = re.fullmatch(r"[PC=] `(.+)`", cell)
            assert found, (setting, cell)
            section, _, name = setting.partition(".")
            assert config[section][name] == parse_fraction(yaml.safe_load(found[1])), setting


def test_the_readme_shows_accuracies_and_step_times_as_they_were_measured() -> None:
    readme = (ROOT / "README.md").read_text()
    made = runpy.run_path(str(ROOT / "docs" / "make_readme.py"))
    assert readme == made["filled"](readme), "run: python -m docs.make_readme"
    row = next(line for line in made["table"]().splitlines() if line.startswith("| TLA |"))
    page = (ROOT / "docs" / "results" / "mnist-tuned.md").read_text()
    for cell in row.strip("| ").split(" | ")[1:-1]:
        assert f" {cell} |" in page


def test_the_compliance_page_names_fields_of_reports() -> None:
    text = (ROOT / "docs" / "compliance.md").read_text()
    named = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)`", text)) - {"model.pretrained"}
    fields = {name for name in named if not name.endswith((".md", ".json", ".parquet", ".sarif", ".npz", ".py"))}
    assert {"accuracy.autoattack", "detection.adaptive", "certified", "corruptions", "relatives"} <= fields
    assert {name.partition(".")[0] for name in fields} <= Report.model_fields.keys()


def test_a_study_is_compared_seed_by_seed() -> None:
    """One variant gains two points with every seed but for rounding, one nothing certain; clean images stay."""
    made = runpy.run_path(str(ROOT / "docs" / "make_study.py"))
    params = {"data.name": "cifar10", "model.name": "cifar_cnn", "training.epochs": "8", "training.max_steps": "null"}
    accuracies = {"none": (0.30, 0.32, 0.34), "more": (0.3200, 0.3401, 0.3600), "other": (0.35, 0.32, 0.31)}
    trials = [
        SimpleNamespace(
            data=SimpleNamespace(
                params=params,
                tags={"tla.searched.ingredient": name, "tla.searched.seed": str(seed), "tla.git_commit": "a" * 40}
                | {"tla.test_images": "10000"},
                metrics={"test/clean_accuracy": 0.5 + 0.01 * seed, "test/robust_accuracy/pgd20": value},
            )
        )
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    text = made["page"]("ingredients", trials, "two cores")
    assert "| none | 3 | 51.0 [48.5, 53.5] | 32.0 [27.0, 37.0] |  |  |" in text
    assert "| more | 3 | 51.0 [48.5, 53.5] | 34.0 [29.0, 39.0] | +0.0 [+0.0, +0.0] | **+2.0 [+2.0, +2.0]** |" in text
    assert "| +0.7 [-9.4, +10.7] |" in text


def test_trials_are_attacked_on_the_margin_from_their_own_weights(tmp_path: Path) -> None:
    """A run that has the figure is left alone; one whose accuracy the weights do not have is an error."""
    made = runpy.run_path(str(ROOT / "docs" / "make_study.py"))
    small = {"data": {"train_limit": 100, "test_limit": 50}, "training": {"max_steps": 2, "global_batch_size": 50}}
    trained = tla_service.train(tla_service.load_config("digits", **small), tmp_path / "trial")
    (tmp_path / "trial" / "latest.json").write_text(json.dumps({"checkpoint": trained["checkpoint"]}))
    clean = {"test/clean_accuracy": trained["clean_accuracy"]}
    runs = [
        SimpleNamespace(info=SimpleNamespace(run_id=run, run_name="trial"), data=SimpleNamespace(metrics=metrics))
        for run, metrics in {"has": clean | {"test/robust_accuracy/margin20": 0.1}, "lacks": clean}.items()
    ]
    logged: list[tuple[str, str, float]] = []
    client = SimpleNamespace(log_metric=lambda *each: logged.append(each))
    made["attack_margins"](client, runs, tmp_path)
    ((run, name, value),) = logged
    assert (run, name) == ("lacks", "test/robust_accuracy/margin20")
    assert 0 <= value <= trained["clean_accuracy"]
    runs[1].data.metrics["test/clean_accuracy"] += 0.1
    with pytest.raises(ValueError, match="not that of run lacks"):
        made["attack_margins"](client, runs, tmp_path)
