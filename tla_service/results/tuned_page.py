"""Sections of a tuned table's page: the protocol, comparisons corrected for their number, what the searches found."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tla_service.config import RunConfig
from tla_service.evaluation.figures import new_figure, plain, save
from tla_service.results import tuned
from tla_service.results.runs import Estimate, Row

LEVEL = 0.05
_SAME = 1e-9  # rounding
_MAP_AXES = ("loss.triplet_weight", "loss.margin")


def label(arm: str) -> str:
    """An arm's or method's name as the pages print it."""
    return arm if arm == "natural" else arm.upper().replace("_", "-")


def protocol_text(table: str, run: RunConfig, seeds: int) -> str:
    """How the table was made, of whose runs `run` has what they share."""
    found, attack, own = tuned.protocol(table), run.evaluation.validation, run.attack
    searched, images = len(found.searched), run.evaluation.validation_limit
    step = attack.step_size or own.step_size
    trained_with = f"PGD-{own.num_steps}" if own.kind == "pgd" else label(own.kind)
    shorter = "".join(f" of `{name}` {value}" for name, value in found.trial_fields.items())
    return (
        f"Network `{run.model.name}`, {run.training.max_steps or run.training.epochs} "
        f"{'steps' if run.training.max_steps else 'epochs'} of {run.training.global_batch_size} images, training with "
        f"{trained_with} at epsilon {own.epsilon:.3g}. Each of {searched} methods had {found.trials} trials{shorter}, "
        f"over its own weights and {' and '.join(f'`{name}`' for name in found.shared)}, the same values of these for "
        f"every method; the best {found.repeated} were trained with a second seed, and the best mean of the two was "
        f"selected. A trial's score is the accuracy on {images or 'all'} validation images that withstand PGD-"
        f"{attack.num_steps} (step {step:.3g}) on the cross-entropy and on the logit margin. The winner was then "
        f"trained with up to {seeds} other seeds and measured once on the test set, {found.images['attacks']} images; "
        f"AutoAttack, on {found.images['autoattack']} images, and the representation with the first {found.full_seeds} "
        "seeds."
    )


def cost_text(table: str, state: Path, rows: Sequence[Row]) -> str:
    """What the trials and the finished runs took, in hours."""
    trials = [name for name, *_ in (*tuned.first_trials(table), *tuned.repeated_trials(table, state))]
    runs = [each for row in rows for each in row.runs]
    searched = sum(tuned.training_seconds(state / name) for name in trials)
    trained = sum(tuned.training_seconds(state / each.run.name) for each in runs)
    hours = [f"{seconds / 3600:.1f}" for seconds in (searched, trained, sum(each.report.seconds for each in runs))]
    return (
        f"Hours by the runs' own clocks: {hours[0]} for the trials, {hours[1]} for training the winners, {hours[2]} "
        "for measuring them. What was repeated after an interruption is not counted, nor are trials that diverged."
    )


@dataclass(frozen=True)
class Difference:
    """Two rows compared by a measure; `p` is of the paired t test, corrected for the number of comparisons."""

    row: str
    less: str
    measure: str
    claimed: float | None
    seeds: int
    found: Estimate
    p: float


def differences(table: str, rows: Mapping[str, Row]) -> list[Difference]:
    """The protocol's comparisons, of which at least two seeds have been measured."""
    made = []
    for each in tuned.protocol(table).comparisons:
        for measure, claimed in each.measures.items():
            pairs = rows[each.row].differences(rows[each.less], measure)
            found = Estimate.over_seeds(pairs)
            if found is not None and len(pairs) > 1:
                made.append(Difference(each.row, each.less, measure, claimed, len(pairs), found, paired_p(pairs)))
    corrected = holm([each.p for each in made])
    return [replace(each, p=p) for each, p in zip(made, corrected, strict=True)]


def paired_p(differences: Sequence[float]) -> float:
    """The paired t test's p value; 1 for equal ones, as shares of images may agree over a few seeds by chance."""
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0).pvalue) if np.ptp(differences) > _SAME else 1.0


def holm(p_values: list[float]) -> list[float]:
    """Adjust p values for their number (Holm 1979): at most as many as the level allows are rejected wrongly."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def gain_cells(table: str, rows: Mapping[str, Row], measure: str) -> dict[str, str]:
    """Each row's difference from AT in a measure, bold where the corrected p value separates them."""
    return {
        each.row: f"**{each.found.text()}**" if each.p < LEVEL else each.found.text()
        for each in differences(table, rows)
        if (each.less, each.measure) == ("at", measure)
    }


def comparison_lines(table: str, rows: Mapping[str, Row]) -> list[str]:
    """A table of all comparisons."""
    found = differences(table, rows)
    if not found:
        return ["Nothing to compare yet."]
    lines = ["| comparison | measure | seeds | claimed | difference | 95% interval | p (Holm) | verdict |"]
    lines.append("|---" * 8 + "|")
    for each in found:
        better = "better" if each.found.value > 0 else "worse"
        verdict = f"**{better}**" if each.p < LEVEL else "not separated"
        claimed = "" if each.claimed is None else f"{each.claimed:+.2f}"
        low, high = 100 * each.found.low, 100 * each.found.high
        lines.append(
            f"| {label(each.row)} less {label(each.less)} | {each.measure} | {each.seeds} | {claimed} | "
            f"{100 * each.found.value:+.2f} | [{low:+.2f}, {high:+.2f}] | {each.p:.3g} | {verdict} |"
        )
    note = (
        f"In points, seed by seed; intervals are Student's and not corrected. A verdict counts if p, corrected for the "
        f"{len(found)} comparisons of this table by Holm's method, is below {LEVEL:g}."
    )
    if any(each.claimed is not None for each in found):
        note += (
            " *Claimed*: by the authors, for larger networks and 20 restarts of the attack; +1.64 is that of the best "
            "of four pool sizes over random negatives, on CIFAR-10 under C&W."
        )
    return [*lines, "", note]


def search_lines(table: str, state: Path, picture: Path) -> list[str]:
    """What the searches found, and the map of TLA's trials."""
    lines = ["| method | trials | selected | validation, two seeds | range of all trials |", "|---" * 5 + "|"]
    for arm in tuned.protocol(table).searched:
        trials = tuned.scored_trials(table, arm, state)
        if not trials:
            continue
        best = max([trial for trial in trials if len(trial.scores) > 1] or trials, key=lambda trial: trial.mean)
        point = ", ".join(f"`{name.rpartition('.')[2]}` {value:g}" for name, value in best.point.items())
        first = [trial.scores[0] for trial in trials]
        lines.append(
            f"| {label(arm)} | {len(trials)} | {point} | {' and '.join(f'{100 * s:.1f}' for s in best.scores)} | "
            f"{100 * min(first):.1f} to {100 * max(first):.1f} |"
        )
    noise = tuned.trial_deviation(table, state)
    if noise is not None:
        lines += ["", f"The score of one trial has a standard deviation of {100 * noise:.2f} points over seeds (pooled "
                  "over all repeated trials)."]  # fmt: skip
    lines += _gain_by_trial(table, state)
    if _draw_map(table, state, picture):
        lines += ["", f"![Trials of TLA over weight and margin](pictures/{picture.name})"]
    return lines


def _gain_by_trial(table: str, state: Path) -> list[str]:
    """Each method less AT in the trials of one number, which share the shared settings and seeds."""
    found = tuned.protocol(table)
    trials = {arm: {each.number: each for each in tuned.scored_trials(table, arm, state)} for arm in found.searched}
    at = trials.pop("at")
    shared = [name.rpartition(".")[2] for name in found.shared]
    titles = [*(f"`{name}`" for name in shared), "AT", *(f"{label(arm)} less AT" for arm in trials)]
    lines = ["", "| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for number, base in sorted(at.items(), key=lambda item: list(item[1].point.values())):
        cells = [*(f"{value:g}" for value in base.point.values()), f"{100 * base.mean:.1f}"]
        for each in trials.values():
            scores = each[number].scores if number in each else ()
            gains = [score - against for score, against in zip(scores, base.scores, strict=False)]  # shared seeds
            cells.append(f"{100 * statistics.mean(gains):+.1f}" if gains else "")
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        "Trials of one number differ only in the method and its own weights; means over their shared seeds, validation."
    )
    return [*lines, "", note]


def _draw_map(table: str, state: Path, path: Path) -> bool:
    """Robust validation accuracy of the trials of every arm with triplets over lambda_1 and alpha."""
    x, y = _MAP_AXES
    arms = {arm: tuned.scored_trials(table, arm, state) for arm in tuned.protocol(table).searched}
    arms = {arm: trials for arm, trials in arms.items() if trials and {x, y} <= trials[0].point.keys()}
    if not arms:
        return False
    scores = [100 * trial.mean for trials in arms.values() for trial in trials]
    drawn = new_figure(3 * len(arms) + 1, 3)
    panels = drawn.subplots(1, len(arms), squeeze=False, sharey=True)[0]
    for panel, (arm, trials) in zip(panels, arms.items(), strict=True):
        shown = panel.scatter(
            [trial.point[x] for trial in trials], [trial.point[y] for trial in trials],
            c=[100 * trial.mean for trial in trials], vmin=min(scores), vmax=max(scores), s=90, edgecolors="k",
        )  # fmt: skip
        panel.set(xscale="log", yscale="log", xlabel="triplet weight", title=label(arm))
        panel.xaxis.set_minor_formatter("")  # they overlap
        plain(panel, "both")
    panels[0].set_ylabel("margin")
    drawn.colorbar(shown, ax=list(panels), label="robust validation accuracy, %")
    save(drawn, path)
    return True
