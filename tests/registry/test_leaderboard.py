"""The leaderboard of twenty versions in a real MLflow store; its script in a browser, where there is one."""

import json
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from http.server import HTTPServer, SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

from jobs.leaderboard import main
from tests.registry.test_evaluations import report
from tests.registry.tracking_server import TrackingServer
from tla_service.config import RunConfig, TrackingConfig
from tla_service.errors import UnavailableError
from tla_service.evaluation import results as rs
from tla_service.job import run_job
from tla_service.registry.evaluations import evaluation_tags
from tla_service.registry.leaderboard import Leaderboard, read_leaderboard, write_leaderboard
from tla_service.registry.lock import RegistryLock
from tla_service.report import schema as rp
from tla_service.tracking.connection import client
from tla_service.tracking.runs import log_files, open_run

LINF, L2 = rp.ThreatModel(norm="linf", epsilon=8 / 255), rp.ThreatModel(norm="l2", epsilon=0.5)
HOSTILE = "tla<img src='x' onerror=alert(1)>"


class Store(NamedTuple):
    uri: str
    run_id: str


def sha256(number: int) -> str:
    return f"{number:02x}" + "0" * 62


def evaluated(run_id: str, number: int) -> rp.Report:
    """An evaluation that depends on the version's number: every fourth under L2, every seventh with a failed audit."""
    threat = L2 if number % 4 == 0 else LINF
    made = report(run_id, sha256(number), threat, 0.0)
    right = 300 + 7 * (number * 37 % 20)
    shares = {"clean": 480, "pgd20": right + 20, "worst": right + 10, "autoattack": right}
    accuracy = {
        name: rs.Accuracy(**vars(rs.wilson_interval(count, 500)), per_class=()) for name, count in shares.items()
    }
    check = rs.Check("a", 0.0, 0.1, "failed" if number % 7 == 0 else "passed", "so", "it matters")
    facts = made.model.model_copy(
        update={"trained_for": LINF, "method": "tla" if number % 2 else "at", "architecture": "preact_resnet_18"}
    )
    changes = {"model": facts, "accuracy": accuracy, "audit": rs.Audit.of([check], 100)}
    if number % 5 == 0:
        changes["accuracy"] = {name: share for name, share in accuracy.items() if name != "autoattack"}
        changes["autoattack"] = None
    return made.model_copy(update=changes)


@pytest.fixture(scope="module")
def store(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Twenty versions of two models; the last two are not evaluated and not of this project."""
    folder = tmp_path_factory.mktemp("leaderboard")
    shutil.copy(template, folder / "mlflow.db")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    run_id = open_run(RunConfig(tracking=TrackingConfig(uri=uri)), "key", facts={})
    made = client(uri)
    for name in ("tla-cifar10", HOSTILE):
        made.create_registered_model(name)
    files: dict[str, Path] = {}
    for number in range(1, 21):
        name = "tla-cifar10" if number <= 12 else HOSTILE
        tags = {} if number == 20 else {"weights_sha256": sha256(number), "method": "tla" if number % 2 else "at"}
        if number < 19:
            found = evaluated(run_id, number)
            tags |= evaluation_tags(found)
            home = rp.artifact_folder(found.model.weights_sha256, found.threat_model)
            for file in ("report.json", "report.html"):
                files[f"{home}/{file}"] = folder / str(number) / file
            (folder / str(number)).mkdir()
            rp.write_report(found, folder / str(number) / "report.json")
            (folder / str(number) / "report.html").write_text("page")
        made.create_model_version(name, str(folder), run_id=run_id, tags=tags)
    log_files(uri, run_id, files)
    assert RegistryLock(made, "tla-cifar10-champion").take(1)
    made.set_registered_model_alias("tla-cifar10", "champion", "3")
    made.set_registered_model_alias("tla-cifar10", "previous", "2")
    return Store(uri, run_id)


@pytest.fixture(scope="module")
def board(store: Store) -> Leaderboard:
    return read_leaderboard(TrackingConfig(uri=store.uri))


@pytest.fixture(scope="module")
def page(board: Leaderboard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_leaderboard(board, tmp_path_factory.mktemp("page") / "new" / "leaderboard.html")


class Rows(HTMLParser):
    """Rows of the page as texts by column, its links, and every tag."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[dict[str, str]] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self._cell = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        if tag == "tr" and "data-model" in values:
            self.rows.append({})
        if tag == "td":
            self._cell = values["data-label"] or ""
            self.rows[-1][self._cell] = ""

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.rows[-1][self._cell] = " ".join(f"{self.rows[-1][self._cell]} {data}".split())

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self._cell = ""


def test_every_version_of_this_project_has_a_row_with_the_figures_of_its_report(
    store: Store, board: Leaderboard, page: Path
) -> None:
    assert (board.models, board.versions, board.foreign, len(board.entries)) == (("tla-cifar10", HOSTILE), 19, 1, 19)
    rows = Rows(page.read_text()).rows
    assert len(rows) == 19
    for entry, row in zip(board.entries, rows, strict=True):
        # Versions of the second model are numbered from 1 again.
        number = int(entry.version) + (12 if entry.name == HOSTILE else 0)
        assert row["model"].startswith(f"{entry.name}/{entry.version}")
        if number == 19:
            assert row["evaluation"] == "not evaluated"
            continue
        expected = evaluated(store.run_id, number)
        for name, label in (("clean", "clean, %"), ("autoattack", "AutoAttack, %"), ("worst", "worst of table, %")):
            share = expected.accuracy.get(name)
            if share is None:
                assert row[label] == "-"
            else:
                assert share.estimate is not None
                interval = f"({100 * share.low:.1f} to {100 * share.high:.1f}; 500)"
                assert row[label] == f"{100 * share.estimate:.1f} {interval}"
        assert row["audit"] == ("failed" if number % 7 == 0 else "passed")
        assert row["threat model"] == ("L2 0.5 (trained for another)" if number % 4 == 0 else "L-infinity 8/255")
        assert entry.aliases == {3: ("champion",), 2: ("previous",)}.get(number, ())
        assert ("★ champion" in row["model"]) == (number == 3)


def test_ranks_are_by_autoattack_among_comparable_trusted_evaluations(board: Leaderboard) -> None:
    for threat in (LINF, L2):
        own = [entry for entry in board.entries if entry.report and entry.report.threat_model == threat]
        assert own == sorted(own, key=lambda entry: (entry.audit == "failed", -(entry.autoattack or -1)))
        counted = [entry.autoattack for entry in own if entry.rank is not None]
        for entry in own:
            if entry.autoattack is None or entry.audit == "failed":
                assert entry.rank is None
            else:
                assert entry.rank == 1 + sum((other or 0) > entry.autoattack for other in counted)
    assert board.entries[-1].report is None


def test_the_page_is_escaped_and_self_contained(page: Path) -> None:
    text = page.read_text()
    found = Rows(text)
    assert not found.tags & {"img", "link", "iframe"}
    assert HOSTILE not in text
    assert all(link.startswith("file:///") and link.endswith("report.html") for link in found.links)
    assert len(found.links) == 18
    assert not re.search(r"https?://", text)


def test_some_models_alone_and_what_cannot_be_shown(store: Store, local_uri: str, tmp_path: Path) -> None:
    tracking = TrackingConfig(uri=store.uri)
    some = read_leaderboard(tracking, ["tla-cifar10"])
    assert (some.models, some.versions) == (("tla-cifar10",), 12)
    with pytest.raises(UnavailableError, match=r"models=mnist: is not registered; choose from tla-cifar10, tla<"):
        read_leaderboard(tracking, ["mnist"])
    with pytest.raises(UnavailableError, match="there is no such file"):
        read_leaderboard(TrackingConfig(uri=f"sqlite:///{tmp_path}/none.db"))
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(UnavailableError, match="has no registered models"):
        read_leaderboard(TrackingConfig(uri=local_uri))
    with HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{other.server_port}"
        with pytest.raises(UnavailableError, match=rf"tracking\.uri={address}: cannot .*; correct the address"):
            read_leaderboard(TrackingConfig(uri=address))
        other.shutdown()
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match=r"output=.*: File exists; choose another --output"):
        write_leaderboard(some, tmp_path / "file" / "page.html")


def test_the_job_writes_the_page_and_says_what_is_in_it(
    store: Store, page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "board.html"
    arguments = ["--tracking.uri", store.uri, "--models", "tla-cifar10", HOSTILE, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", *arguments])
    assert run_job(main) == 0
    assert output.read_bytes() == page.read_bytes()
    assert capsys.readouterr().out.splitlines() == [
        "19 versions of 2 models, 18 evaluations",
        "left out: 1 versions that this project did not register",
        f"leaderboard  {output}",
    ]


def test_links_lead_to_a_servers_pages(server: TrackingServer, tmp_path: Path) -> None:
    run_id = open_run(RunConfig(tracking=TrackingConfig(uri=server.uri)), "key-leaderboard", facts={})
    made = client(server.uri)
    made.create_registered_model("leader board-lock-2")
    source = str(made.get_run(run_id).info.artifact_uri)
    version = made.create_model_version(
        "leader board-lock-2", source, run_id=run_id, tags={"weights_sha256": sha256(1)}
    )
    rp.write_report(evaluated(run_id, 1), tmp_path / "report.json")
    home = rp.artifact_folder(sha256(1), LINF)
    log_files(server.uri, run_id, {f"{home}/report.json": tmp_path / "report.json"})
    (entry,) = read_leaderboard(TrackingConfig(uri=server.uri), ["leader board-lock-2"]).entries
    experiment = made.get_run(run_id).info.experiment_id
    run = f"{server.uri}/#/experiments/{experiment}/runs/{run_id}"
    assert entry.links == {
        "version": f"{server.uri}/#/models/leader%20board-lock-2/versions/{version.version}",
        "run": run,
        "report": f"{run}/artifacts/{home}/report.html",
    }


def test_an_unreadable_report_and_one_of_other_weights_are_named(local_uri: str, tmp_path: Path) -> None:
    uri, made = local_uri, client(local_uri)
    run_id = open_run(RunConfig(tracking=TrackingConfig(uri=uri)), "key", facts={})
    made.create_registered_model("tla-digits")
    (tmp_path / "report.json").write_text("{}")
    for number, content in ((1, None), (2, evaluated(run_id, 3))):
        made.create_model_version("tla-digits", str(tmp_path), run_id=run_id, tags={"weights_sha256": sha256(number)})
        if content is not None:
            rp.write_report(content, tmp_path / "report.json")
        log_files(uri, run_id, {f"{rp.artifact_folder(sha256(number), LINF)}/report.json": tmp_path / "report.json"})
    troubles = {entry.version: entry.trouble for entry in read_leaderboard(TrackingConfig(uri=uri)).entries}
    assert troubles["1"].endswith("cannot be read")
    assert troubles["2"] == "the report is of other weights"


def test_a_run_that_is_gone_has_a_row_and_a_server_that_fails_meanwhile_ends_the_job(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, is_down = tmp_path / "board.html", False

    def lose(*_: object) -> None:
        nonlocal is_down
        is_down = True
        raise MlflowException("no such run", RESOURCE_DOES_NOT_EXIST)

    def search(self: MlflowClient, *arguments: Any, **options: Any) -> object:
        if is_down:
            raise ConnectionError("connection refused")
        return models(self, *arguments, **options)

    models = MlflowClient.search_registered_models
    monkeypatch.setattr(MlflowClient, "get_run", lose)
    assert {entry.trouble for entry in read_leaderboard(TrackingConfig(uri=store.uri)).entries} == {
        "its run cannot be read (no such run)"
    }
    is_down = False
    monkeypatch.setattr(MlflowClient, "search_registered_models", search)
    monkeypatch.setattr("tla_service.errors.time.sleep", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", "--tracking.uri", store.uri, "--output", str(output)])
    assert run_job(main) == 3
    assert capsys.readouterr().err.startswith("error: MLflow: reading the models failed (connection refused); ")
    assert not output.exists()


BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
# Clicks and filters as a reader does, and writes what is shown into the page.
DRIVER = """<script>
const shown = () => [...board.tBodies[0].rows].filter((row) => !row.hidden).map((row) => valueOf(row, "model"));
const head = (key) => board.tHead.querySelector(`[data-key="${key}"] button`);
const set = (name, value) => {
  const field = form.querySelector(`[data-filter="${name}"]`);
  if (field.type === "checkbox") field.checked = value; else field.value = value;
  field.dispatchEvent(new Event("input", {bubbles: true}));
};
const seen = {start: shown()};
head("autoattack").click(); seen.high = shown(); seen.sort = head("autoattack").parentNode.getAttribute("aria-sort");
head("autoattack").click(); seen.low = shown();
sort.value = "model"; sort.dispatchEvent(new Event("input", {bubbles: true})); seen.model = shown();
set("threat", "L2 0.5"); seen.l2 = shown(); seen.count = count.textContent; set("audit", "failed"); seen.both = shown();
set("threat", ""); set("audit", ""); set("alias", true); seen.alias = shown();
set("alias", false); set("text", "IMG "); seen.text = shown();
const written = Object.assign(document.createElement("pre"), {id: "seen", textContent: JSON.stringify(seen)});
document.body.replaceChildren(written);
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_rows_are_sorted_and_filtered_in_a_browser(board: Leaderboard, page: Path, tmp_path: Path) -> None:
    driven = tmp_path / "driven.html"
    driven.write_text(page.read_text().replace("</body>", DRIVER))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", driven.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    assert found is not None, done.stdout[-2000:]
    seen = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))

    def names(entries: list[int]) -> list[str]:
        return [f"{board.entries[at].name} {int(board.entries[at].version):09d}" for at in entries]

    everything = list(range(19))
    figures = [entry.autoattack for entry in board.entries]
    measured, without = ([at for at in everything if (figures[at] is None) == missing] for missing in (False, True))
    assert seen["start"] == names(everything)
    assert seen["high"] == names([*sorted(measured, key=lambda at: -(figures[at] or 0)), *without])
    assert seen["low"] == names([*sorted(measured, key=lambda at: figures[at] or 0), *without])
    assert seen["sort"] == "descending"
    assert sorted(seen["model"]) == sorted(names(everything))
    cifar = [name for name in seen["model"] if name.startswith("tla-cifar10")]
    assert cifar == sorted(cifar)
    l2 = [at for at in everything if (each := board.entries[at].report) and each.threat_model == L2]
    assert sorted(seen["l2"]) == sorted(names(l2))
    assert seen["count"] == f"{len(l2)} of 19 rows"
    assert sorted(seen["both"]) == sorted(names([at for at in l2 if board.entries[at].audit == "failed"]))
    assert sorted(seen["alias"]) == ["tla-cifar10 000000002", "tla-cifar10 000000003"]
    assert sorted(seen["text"]) == sorted(names([at for at in everything if board.entries[at].name == HOSTILE]))
