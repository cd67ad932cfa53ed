"""The page of a table: our figures with intervals, the paper's beside them, what is missing, and what it all says."""

import math
from collections.abc import Sequence
from pathlib import Path

from tla_service.report.paper_results import differences_from_paper, paper_row
from tla_service.results.figures import Estimate, Row, difference, over_seeds, read_row
from tla_service.results.pictures import method_bars, pool_curve
from tla_service.results.settings import ReproduceSettings
from tla_service.results.tables import POOL_SIZES, Unit, run_config, share_of_budget, units

NAMES: dict[str, str] = {
    "natural": "UM",
    "at": "AT",
    "alp": "ALP",
    "trades": "TRADES",
    "mart": "MART",
    "tla_rn": "TLA-RN",
    "tla_sa": "TLA-SA",
    "tla": "TLA",
}
# Device hours of one run, measuring included: estimates from its passes, not measurements.
_GPU_HOURS = {"mnist": 3, "cifar10": 15, "tiny_imagenet": 40, "digits": 0.1}
_MODERN_GPU_HOURS = {"mnist": 1, "cifar10": 1, "tiny_imagenet": 3}


def command(settings: ReproduceSettings) -> str:
    """What makes the page."""
    parts = ["python jobs/reproduce_paper.py --table", settings.table]
    if settings.budget is not None:
        parts.append(f"--budget {settings.budget:g}")
    parts.append(f"--seeds {settings.seeds}")
    if settings.recipe != "paper":
        parts.append(f"--recipe {settings.recipe}")
    if settings.methods:
        parts.append(f"--methods {' '.join(settings.methods)}")
    if not settings.pools:
        parts.append("--no-pools")
    if settings.data.root is not None:
        parts.append(f"--data.root /data/{settings.table}")
    return " ".join(parts)


def write_page(settings: ReproduceSettings, state: Path) -> Path:
    """Write the page and its pictures from the runs that have finished; returns where.

    Args:
        settings: The table.
        state: Holds a folder of each run.
    """
    path = settings.page
    todo = list(units(settings))
    rows = [
        read_row(NAMES.get(method, method), [u for u in todo if u.method == method and u.pool_size is None], state)
        for method in settings.all_methods
    ]
    pools = {size: read_row(str(size), [u for u in todo if u.pool_size == size], state) for size in POOL_SIZES}
    pools = {size: row for size, row in pools.items() if row.units}
    measured = [row for row in rows if row.units]
    title = "the paper's table, remade" if settings.recipe == "paper" else "what to train today, against its baselines"
    lines = [f"# {settings.table}: {title}", "", *_settings(settings, rows), ""]
    if measured:
        first = measured[0].measured[0]
        columns = ["clean", *first["columns"]]
        strong = [name for name in (first["iterative"], "autoattack") if name in first["accuracy"]]
        columns += [name for name in ("autoattack",) if name in first["accuracy"]]
        pictures = path.parent / "pictures"
        method_bars(measured, ["clean", *strong], pictures / f"{settings.page_name}-methods.png")
        lines += [f"![Methods](pictures/{settings.page_name}-methods.png)", ""]
        lines += ["## Accuracy, %", "", *_table(settings, rows, columns), ""]
        radii = [f"{ratio['epsilon']:.3g}" for ratio in first["shift"]]
        if first["detection"] is not None:
            names = ["detection", "neighbours clean", "neighbours attacked"]
            names += [f"{kind} {radius}" for radius in radii for kind in ("r", "r'")]
            lines += ["## Representation", "", *_table(settings, rows, names), ""]
            lines += ["Detection is the area under the ROC curve and neighbours are accuracies, both in percent; r is "
                      "better high, r' low.", ""]  # fmt: skip
        if pools:
            lines += _study(settings, measured, pools, ["clean", first["iterative"]])
        lines += ["## What it says", "", *_reading(rows, ["clean", *strong, "detection", "neighbours attacked"]), ""]
    lines += _missing(settings, rows, pools)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path


def _study(settings: ReproduceSettings, rows: Sequence[Row], pools: dict[int, Row], names: list[str]) -> list[str]:
    """The study of pool sizes; where the table's TLA takes its own batch as the pool, that beside a separate one."""
    picture = f"{settings.page_name}-pools.png"
    pool_curve(pools, names, settings.page.parent / "pictures" / picture)
    lines = ["## Size of the pool", "", f"![Pool sizes](pictures/{picture})", ""]
    lines += [*_table(settings, list(pools.values()), names, head="pool"), ""]
    config = run_config(settings, Unit("", "tla", 0))
    shared = next((row for row in rows if row.label == NAMES["tla"]), None)
    if config.mining.pool == "batch" and shared is not None:
        batch = config.training.global_batch_size
        nearest = min(pools, key=lambda size: abs(size - batch))
        compared = _compared(shared, pools[nearest], names)
        lines += [f"The table's TLA mines in its own batch of {batch} images (`mining.pool: batch`), which costs less "
                  f"than a pool of its own. It, less TLA with a separate pool of {nearest}, in points {compared}.",
                  ""]  # fmt: skip
    return lines


def _settings(settings: ReproduceSettings, rows: Sequence[Row]) -> list[str]:
    devices, commits = (
        ", ".join(sorted({measured[name] for row in rows for measured in row.measured})) for name in ("device", "code")
    )
    config = run_config(settings, next(iter(units(settings))))
    lines = [f"Made by `{command(settings)}`" + (f"; runs measured at {commits} on {devices}." if commits else ".")]
    if settings.budget is not None:
        steps, attack = config.training.max_steps, config.attack
        whose = "the paper's" if settings.recipe == "paper" else f"those of preset `modern_{settings.table}`"
        grows = f", epsilon growing over the first {attack.warmup:.0%}" if attack.warmup else ""
        lines += ["", f"**Reduced settings**, {share_of_budget(settings):.0%} of their full length: network "
                  f"`{config.model.name}`, {steps} steps of {config.training.global_batch_size} images, PGD-"
                  f"{attack.num_steps} while training{grows}. The settings are not {whose}, and figures are not to be "
                  "compared with published ones."]  # fmt: skip
    images = max((m["accuracy"]["clean"]["images"] for row in rows for m in row.measured), default=0)
    same = all(measured["is_paper"] for row in rows for measured in row.measured)
    apart = differences_from_paper(settings.table, config.model.name, images, same_attacks=same)
    if apart and images and settings.recipe == "paper":
        lines += ["", f"What sets it apart from the paper's table: {'; '.join(apart)}."]
    cells = "Cells are means over seeds with Student's 95% interval, of the weights that were best on validation."
    if settings.budget_name == "paper":
        cells += " Rows called *paper* hold its own figures; none of them is in a row of ours."
    lines += ["", cells]
    return lines + _warnings(rows)


def _warnings(rows: Sequence[Row]) -> list[str]:
    """What AutoAttack says of the runs; those of earlier versions kept nothing of it."""
    named: dict[str, list[str]] = {}
    for row in rows:
        for unit, measured in zip(row.units, row.measured, strict=True):
            for warning in measured.get("warnings", ()):
                named.setdefault(warning, []).append(f"`{unit.name}`")
    return [
        text for warning, names in named.items() for text in ("", f"AutoAttack warns of {', '.join(names)}: {warning}.")
    ]


def _table(settings: ReproduceSettings, rows: Sequence[Row], names: Sequence[str], head: str = "method") -> list[str]:
    lines = [f"| {head} | seeds | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for row in rows:
        cells = [_cell(over_seeds(row.values(name)), percent=name.split()[0] not in ("r", "r'")) for name in names]
        lines.append(f"| {row.label} | {len(row.units)} | " + " | ".join(cells) + " |")
        method = next((method for method, label in NAMES.items() if label == row.label), None)
        paper = paper_row(settings.table, method) if method and settings.budget_name == "paper" else None
        if paper is not None and "clean" in names:
            printed = [f"{paper.accuracy[name]:.2f}" if name in paper.accuracy else "" for name in names]
            lines.append(f"| *{row.label}, paper* | | " + " | ".join(printed) + " |")
    return lines


def _cell(estimate: Estimate | None, *, percent: bool) -> str:
    if estimate is None:
        return ""
    scale, digits = (100, 1) if percent else (1, 3)
    text = f"{scale * estimate.value:.{digits}f}"
    if math.isnan(estimate.low):
        return text
    return f"{text} [{scale * estimate.low:.{digits}f}, {scale * estimate.high:.{digits}f}]"


def _reading(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """TLA against each baseline, measure by measure: decided only where the interval leaves zero out."""
    by_label = {row.label: row for row in rows if row.units}
    ours = by_label.pop("TLA", None)
    if ours is None:
        return ["TLA has not been measured yet."]
    others = [other for other in by_label.values() if other.label != NAMES["natural"]]
    lines = [f"- TLA less {other.label}, in points {_compared(ours, other, names)}." for other in others]
    note = "*Undecided* means that the interval holds zero: by these runs nobody can say which is better."
    return [*lines, "", note] if lines else ["There is no baseline to compare TLA with yet."]


def _compared(ours: Row, other: Row, names: Sequence[str]) -> str:
    """Differences measure by measure, and on which seeds they rest."""
    verdicts = []
    for name in names:
        found = difference(ours, other, name)
        if found is None:
            continue
        shown = f"{name} {100 * found.value:+.1f}"
        if math.isnan(found.low):
            verdicts.append(f"{shown} (one seed, no interval)")
            continue
        says = "**better**" if found.low > 0 else "**worse**" if found.high < 0 else "undecided"
        verdicts.append(f"{shown} [{100 * found.low:+.1f}, {100 * found.high:+.1f}] {says}")
    seeds = len({unit.seed for unit in ours.units} & {unit.seed for unit in other.units})
    over = f"{seeds} seeds in common" if seeds > 1 else "one seed in common: intervals are over test images"
    return f"({over}): {'; '.join(verdicts)}"


def _missing(settings: ReproduceSettings, rows: Sequence[Row], pools: dict[int, Row]) -> list[str]:
    """What has not been run, and what it takes."""
    done = {unit.name for row in (*rows, *pools.values()) for unit in row.units}
    left = [unit.name for unit in units(settings) if unit.name not in done]
    if not left:
        return []
    if settings.budget is None:
        each = _GPU_HOURS if settings.recipe == "paper" else _MODERN_GPU_HOURS
        hours = len(left) * each[settings.table]
        takes = f"about {hours:g} hours of one H100-class GPU, run one after another: an estimate, not a measurement"
    else:
        takes = f"about {settings.budget * len(left) / max(1, len(left) + len(done)):.0f} minutes on two CPU cores"
    return ["## Not run yet", "", f"{len(left)} runs: {', '.join(f'`{name}`' for name in left)}.", "",
            f"`{command(settings)}` makes them, in {takes}."]  # fmt: skip
