"""Dashboard and alert rules ask for metrics that exist; the rules do what they promise."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import ray
import yaml

from tla_service.cluster.metrics import COUNTERS, GAUGES

FOLDER = Path(__file__).parents[2] / "deploy" / "observability"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
RULES = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
ASKED = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]] + [r["expr"] for r in RULES]
PROMTOOL = os.environ.get("TLA_TEST_PROMTOOL") or shutil.which("promtool")
OURS = {f"ray_{name}" for name in (*GAUGES, *COUNTERS)}


def rays_own() -> str:
    """The panels that Ray itself brings, as text: they name its metrics."""
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    return (folder / "default_dashboard_panels.py").read_text()


def test_every_metric_that_is_asked_for_exists() -> None:
    named = {name for expression in ASKED for name in re.findall(r"\bray_\w+", expression)}
    assert {name for name in named if name.startswith("ray_tla_")} <= OURS
    foreign = {name.removeprefix("ray_") for name in named - OURS}
    assert foreign
    assert all(name in rays_own() for name in foreign)


def test_every_metric_of_ours_is_shown_but_the_plain_counts() -> None:
    shown = {name for expression in ASKED for name in re.findall(r"\bray_tla_\w+", expression)}
    assert OURS - shown == {"ray_tla_epoch", "ray_tla_workers"}


def test_panels_have_a_place_of_their_own_and_explain_themselves() -> None:
    cells: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        assert panel["description"], panel["title"]
        place = panel["gridPos"]
        taken = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= taken


RULE_TESTS = """
rule_files: [alerts.yaml]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'ray_tla_last_progress_timestamp_seconds{run="stands"}', values: '0x60'}
      - {series: 'ray_tla_last_progress_timestamp_seconds{run="goes on"}', values: '0+60x60'}
      - {series: 'ray_tla_worker_restarts_total{run="falls"}', values: '0+1x60'}
      - {series: 'ray_tla_worker_restarts_total{run="fell once"}', values: '0x20 1x40'}
      - {series: 'ray_tla_runs_ended_total{run="diverged", outcome="loss_not_finite"}', values: '_x20 1x200'}
      - {series: 'ray_tla_runs_ended_total{run="done", outcome="finished"}', values: '_x20 1x200'}
      - {series: 'ray_tla_unsent_bytes{run="waits"}', values: '100x60'}
    alert_rule_test:
      - {eval_time: 29m, alertname: TrainingStalled, exp_alerts: []}
      - {eval_time: 40m, alertname: TrainingStalled, exp_alerts: [{exp_labels: {severity: warning, run: stands}}]}
      - {eval_time: 40m, alertname: FrequentWorkerRestarts, exp_alerts: [{exp_labels: {severity: warning, run: falls}}]}
      - {eval_time: 10m, alertname: LossNotFinite, exp_alerts: []}
      - eval_time: 40m
        alertname: LossNotFinite
        exp_alerts: [{exp_labels: {severity: warning, run: diverged, outcome: loss_not_finite}}]
      - {eval_time: 120m, alertname: LossNotFinite, exp_alerts: []}
      - {eval_time: 10m, alertname: MetricsUnsent, exp_alerts: []}
      - {eval_time: 20m, alertname: MetricsUnsent, exp_alerts: [{exp_labels: {severity: warning, run: waits}}]}
"""


def test_kubernetes_gets_the_same_rules() -> None:
    resources = yaml.safe_load_all((FOLDER / "kube-monitoring.yaml").read_text())
    rules = next(resource for resource in resources if resource["kind"] == "PrometheusRule")
    assert rules["spec"] == yaml.safe_load((FOLDER / "alerts.yaml").read_text())


@pytest.mark.skipif(PROMTOOL is None, reason="alert rules: put promtool on the PATH, or set TLA_TEST_PROMTOOL to it")
def test_the_rules_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    rules = yaml.safe_load((FOLDER / "alerts.yaml").read_text())
    for rule in rules["groups"][0]["rules"]:
        del rule["annotations"]  # what is tested is when they fire
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(rules))
    (tmp_path / "tests.yaml").write_text(RULE_TESTS)
    for command in (["check", "rules", str(FOLDER / "alerts.yaml")], ["test", "rules", str(tmp_path / "tests.yaml")]):
        done = subprocess.run([str(PROMTOOL), *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
