"""The page of a report."""

import io
import re
from pathlib import Path

import numpy as np
import pytest

from tests.report.measured import MODEL, Page, check, found, measured, of_the_gate, plan, report, run
from tests.report.subjects import digits
from tla_service.evaluation import results as rs
from tla_service.evaluation.results import Accuracy
from tla_service.report import schema as rp
from tla_service.report import tables as tb
from tla_service.report.figures import Figures
from tla_service.report.page import model_names, show, template, write_page
from tla_service.report.task_list import (
    query_task,
)
from tla_service.training.reporting import Terminal

pytestmark = pytest.mark.filterwarnings("ignore:Please import `gaussian_filter`:DeprecationWarning")


def test_page_shows_norms_corruptions_and_calibration(tmp_path: Path) -> None:
    made = report()
    assert made.corruptions is not None
    assert made.corruptions.mean_error is not None
    write_page(made, [], tmp_path / "report.html", same_attacks=False)
    text = " ".join(re.sub(r"<[^>]+>", " ", (tmp_path / "report.html").read_text()).split())
    assert "Trained for L-infinity 0.15: accuracy in each norm" in text
    assert "L0 1 value FMN, smallest perturbation found" in text
    assert f"The mean corruption error is {100 * made.corruptions.mean_error:.1f} %, not normalised" in text
    assert "float32; in 1 s, without shards taken from an earlier start" in text
    for name in ("gaussian noise", "jpeg compression", "Expected calibration error over 15 bins"):
        assert name in text


def test_natural_training_is_for_no_threat_model(tmp_path: Path) -> None:
    natural = report().model.model_copy(update={"method": "natural"})
    write_page(report(model=natural), [], tmp_path / "report.html", same_attacks=False)
    text = " ".join((tmp_path / "report.html").read_text().split())
    assert "Trained without an attack: accuracy in each norm" in text
    assert "Trained for" not in text


def test_the_page_shows_relatives_and_planted_examples(tmp_path: Path) -> None:
    relatives = (
        rs.Relative("last", "its weights after the last epoch", rs.wilson_interval(30, 40)),
        rs.Relative("average", "an average", why="there is <none>"),
    )
    attacks = tuple(rs.AttackTest(name, rs.wilson_interval(9, 10), judged=name != "fgsm") for name in ("fgsm", "pgd"))
    tests = rs.UnitTests(12, rs.wilson_interval(1, 10), attacks, 0.8)
    write_page(report(relatives=relatives, unit_tests=tests), [], tmp_path / "a.html", same_attacks=False)
    text = " ".join(re.sub(r"<[^>]+>", " ", (tmp_path / "a.html").read_text()).split())
    assert "last its weights after the last epoch 75.0 59.8 to 85.8 40" in text
    assert "average an average left out: there is &lt;none&gt;" in text
    assert "fgsm 90.0 59.6 to 98.2 not judged: one step pgd 90.0 59.6 to 98.2 80" in text
    assert "random sampling 10.0" in text
    assert "10 of 12 test images" in text
    assert "correct under every attack of the table and every transferred example" in text
    assert "Transfer attacks were left out: no surrogate was given." in text
    why = rs.UnitTests(12, rs.wilson_interval(0, 0), (), 0.8, "the balls overlap")
    made = report(unit_tests=why, relatives=relatives[1:], surrogate=report().model)
    write_page(made, [], tmp_path / "b.html", same_attacks=False)
    text = " ".join((tmp_path / "b.html").read_text().split())
    assert "Attack unit tests were not run: the balls overlap." in text
    assert "and every transferred example" not in text
    assert "Transfer attacks were left out: the table has the attacks that were chosen." in text


def test_page_shows_outcomes_warnings_and_the_surrogate(tmp_path: Path) -> None:
    own = {
        "architecture": "small_cnn",
        "images": 1212,
        "steps": 500,
        "seconds": 3.4,
        "clean_accuracy": 0.975,
        "held_out": 135,
    }
    checks = [check("a", "passed"), check("b", "failed"), check("c", "not run", None)]
    audit = {"trusted": False, "images": 9, "checks": checks, "surrogate": own}
    facts = report().autoattack
    assert facts is not None
    (other,) = report().compared
    made = report(
        audit=audit,
        autoattack=facts.model_copy(update={"warnings": ("it <seems> random",)}),
        compared=(other.model_copy(update={"warnings": ("so does this",)}),),
    )
    write_page(made, [], tmp_path / "report.html", same_attacks=False)
    text = " ".join(Page((tmp_path / "report.html").read_text()).text.split())
    assert "1 of 3 checks passed, 1 failed (b), 1 not run (c)" in text
    assert all(shown in text for shown in ("✓ passed", "✗ failed", "- not run", "c is so"))
    assert "small_cnn, 500 steps on 1212 training images in 3 s, clean accuracy 97.5 % on 135 held-out ones" in text
    assert "AutoAttack warns: it <seems> random" in text
    assert "AutoAttack warns about other: so does this" in text


def test_page_names_another_threat_model_of_an_attack(tmp_path: Path) -> None:
    attacks = report().attacks
    l2 = attacks["fgsm"].model_copy(update={"norm": "l2", "epsilon": 0.6})
    write_page(report(attacks=attacks | {"fgsm": l2}), [], tmp_path / "report.html", same_attacks=False)
    assert "FGSM, one step, up to 0.6 in L2" in (tmp_path / "report.html").read_text()


def test_page_holds_every_figure_and_fetches_nothing(tmp_path: Path) -> None:
    figures = Figures(tmp_path / "figures", found(), plan(), digits().class_names)
    figures.accuracy()
    figures.curves()
    figures.beyond()
    figures.certified()
    figures.detection()
    figures.shift({"TLA": found(), "AT": found(1)})
    figures.maps("digits")
    natural = found().embedded["natural"]
    figures.queries(run(query_task(plan(), MODEL, natural.rows[:2])), digits())
    assert len({figure.path for figure in figures.drawn}) == len(figures.drawn) >= 10
    write_page(report(), figures.drawn, tmp_path / "report.html", same_attacks=False)
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.images) == len(figures.drawn)
    assert all(link.startswith("data:image/png;base64,") for link in page.links)
    assert all(image["alt"] for image in page.images)
    for figure in figures.drawn:
        assert figure.path.stat().st_size > 5000
        assert figure.title in page.text
    assert "<b>digits</b>" in page.text  # a name is text, never markup
    assert re.search(r"TLA minus AT\s+other", page.text)  # its address: two of one method are told apart
    assert "Not audited" in page.text


def test_models_of_one_method_have_names_of_their_own() -> None:
    """They are the keys of a figure: one of them would take the place of another."""
    facts = report().model
    models = [
        facts.model_copy(update={"method": method, "weights_sha256": digit * 64})
        for method, digit in zip(
            ("tla", "at", "tla", "tla_rn", "trades", "mart", "natural", "imported"), "abcdefgh", strict=True
        )
    ]
    assert model_names(models) == [
        "TLA aaaaaa", "AT", "TLA cccccc", "TLA-RN", "TRADES", "MART", "natural training", "imported",
    ]  # fmt: skip


def test_page_says_which_images_are_the_gates(tmp_path: Path) -> None:
    rest = tb.accuracies(of_the_gate(False), plan(), 10)
    count = int(digits().gate.sum())
    gate = rp.GateFacts(images=count, accuracy=tb.accuracies(of_the_gate(True), plan(), 10))
    audit = {"trusted": True, "images": 9, "checks": []}
    write_page(report(accuracy=rest, gate=gate, audit=audit), [], tmp_path / "report.html", same_attacks=False)
    text = " ".join(re.sub(r"<[^>]+>", " ", (tmp_path / "report.html").read_text()).split())
    assert f"Figures are of up to {60 - count} of the 60 test images. The other {count} are set aside" in text
    assert (
        "On 9 test images, those set aside for the gate among them; restarts_gain_little and white_box_against" in text
    )
    assert "gate, % gate images" in text
    clean, own = rest["clean"], gate.accuracy["clean"]
    assert own.estimate is not None
    line = text[text.index("clean no attack") :]
    assert f"{clean.images} {100 * own.estimate:.1f} {own.images} " in line[:80]


@pytest.mark.parametrize("with_autoattack", [True, False])
def test_classes_are_listed_the_weakest_first(tmp_path: Path, with_autoattack: bool) -> None:
    def figures(share: rs.Share) -> str:
        estimate = "-" if share.estimate is None else f"{100 * share.estimate:.1f}"
        return f"{estimate} {100 * share.low:.1f} to {100 * share.high:.1f} {share.images}"

    table = tb.accuracies(found(), plan(), 10)
    made = report(accuracy=table if with_autoattack else {k: v for k, v in table.items() if k != "autoattack"})
    right: dict[int, list[bool]] = {}
    columns = measured()[MODEL, "columns"]
    names = ("clean", *plan().columns, *plan().transfer)
    standing = np.logical_and.reduce([columns.standing(name) for name in names])
    for label, stands in zip(columns.labels.tolist(), standing.tolist(), strict=True):
        right.setdefault(label, []).append(stands)
    weakest = min(range(10), key=lambda label: sum(right[label]) / len(right[label]))
    expected = rs.wilson_interval(sum(right[weakest]), len(right[weakest]))

    write_page(made, [], tmp_path / "report.html", same_attacks=False)
    text = " ".join(re.sub(r"<[^>]+>", " ", (tmp_path / "report.html").read_text()).split())
    assert f"Worst class: {weakest} , {100 * expected.estimate:.1f} %" in text
    shown = [name for name in ("clean", "worst", "autoattack") if name in made.accuracy]
    rows = {
        label: f" {label} {' '.join(figures(table[name].per_class[label]) for name in shown)} " for label in range(10)
    }
    places = {label: text.index(row) for label, row in rows.items()}
    assert min(places, key=places.__getitem__) == weakest
    robust = [table["worst"].per_class[label].estimate for label in sorted(places, key=places.__getitem__)]
    assert robust == sorted(robust)

    stream = io.StringIO()
    show(made, tmp_path, Terminal(stream))
    (line,) = [line for line in stream.getvalue().splitlines() if line.startswith("worst class")]
    assert f"{100 * expected.estimate:.2f} %   95%: {100 * expected.low:.1f} to {100 * expected.high:.1f}" in line
    assert f"({weakest}, {len(right[weakest])} images)" in line


def test_the_papers_figures_stand_beside_those_of_all_test_images(tmp_path: Path) -> None:
    """7,500 images are reported on and 2,500 are the gate's: together the paper's 10,000."""
    most, rest = (
        Accuracy(estimate=estimate, low=0, high=1, images=images) for estimate, images in ((0.9, 7500), (0.5, 2500))
    )
    names = ("clean", "fgsm", "worst")
    facts = report().model.model_copy(update={"architecture": "mnist_cnn"})
    page = report(
        model=facts,
        data=rp.DataFacts(name="mnist", images=10_000, fingerprint="f", class_names=digits().class_names),
        accuracy=dict.fromkeys(names, most),
        gate=rp.GateFacts(images=2500, accuracy=dict.fromkeys(names, rest)),
        compared=(),
    )
    write_page(page, [], tmp_path / "report.html", same_attacks=True)
    text = " ".join(re.sub(r"<[^>]+>", " ", (tmp_path / "report.html").read_text()).split())
    assert "all test images, % paper, %" in text
    assert "90.0 0.0 to 100.0 7500 50.0 2500 80.00 99.52" in text


@pytest.mark.parametrize(("images", "bank", "shown"), [(7500, 10_000, True), (375, 10_000, False), (7500, 100, False)])
def test_the_papers_representation_stands_beside_that_of_all_images(
    images: int, bank: int, shown: bool, tmp_path: Path
) -> None:
    share = rs.Share(0.9, 0.8, 1.0, images)
    whole = {name: Accuracy(estimate=0.9, low=0, high=1, images=7500) for name in ("clean", "fgsm", "worst")}
    rest = {name: Accuracy(estimate=0.9, low=0, high=1, images=2500) for name in whole}
    page = report(
        model=report().model.model_copy(update={"architecture": "mnist_cnn"}),
        data=rp.DataFacts(name="mnist", images=10_000, fingerprint="f", class_names=digits().class_names),
        accuracy=whole,
        gate=rp.GateFacts(images=2500, accuracy=rest),
        neighbours=rs.Neighbours(5, bank, share, share),
        compared=(),
    )
    write_page(page, [], tmp_path / "report.html", same_attacks=True)
    assert ("as the paper has it" in (tmp_path / "report.html").read_text()) == shown


def test_page_shows_the_papers_figures_only_in_its_setting(tmp_path: Path) -> None:
    write_page(report(), [], tmp_path / "report.html", same_attacks=True)
    assert "the paper has no digits" in (tmp_path / "report.html").read_text()


def test_cards_and_pages_show_names_as_text() -> None:
    name = "<script>alert('x')</script>"
    assert (
        template("model_card.md.j2").environment.from_string("{{ name }}").render(name=name).startswith("&lt;script>")
    )
    shown = template("report.html.j2").environment.from_string("{{ name }}{{ 1.5 }}").render(name=name)
    assert shown == "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;1.5"
