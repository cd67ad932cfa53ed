"""An evaluation on Ray, logged to MLflow."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tla_service.cluster.session import starting, warm_session
from tla_service.job import next_command
from tla_service.report.settings import EvaluateSettings

if TYPE_CHECKING:
    from tla_service.report.schema import Report


def evaluate_and_log(settings: EvaluateSettings) -> int:
    """Evaluate a model on Ray and log the report to the run that trained it; returns the job's exit code, 0."""
    # Importing torch and MLflow, loading the model, and the checks, take as long as Ray takes to start.
    with starting(warm_session(settings.scaling, "tla_service.cluster.tasks", debug=settings.debug)) as join:
        return _evaluate(settings, join)


def _evaluate(settings: EvaluateSettings, join: Callable[[], None]) -> int:
    from tla_service.cluster.tasks import Workers
    from tla_service.registry.evaluations import log_evaluation
    from tla_service.registry.subject import load_subject
    from tla_service.report.evaluate import evaluate
    from tla_service.report.loading import load_models
    from tla_service.report.page import show
    from tla_service.report.schema import FILES, PAGE_FILE, REPORT_FILE
    from tla_service.tracking.connection import tracking_uri
    from tla_service.tracking.runs import check_run
    from tla_service.training.reporting import Terminal

    terminal = Terminal()
    uri = tracking_uri(settings.tracking)
    models = load_models(settings, lambda address, field: load_subject(address, field, uri))
    if settings.log and models.subject.facts.run_id is not None:
        check_run(uri, models.subject.facts.run_id, settings.model)

    def workers() -> Workers:
        join()
        return Workers(settings.scaling)

    report, output = evaluate(settings, models, workers, terminal)
    tagged: tuple[str, ...] = ()
    # Also if it has finished before: MLflow may have been away by then.
    if settings.log and report.model.run_id is not None:
        written = [output / name for name in FILES] + sorted((output / "figures").glob("*"))
        files = {path.relative_to(output).as_posix(): path for path in written if path.is_file()}
        tagged = log_evaluation(uri, report, files)
        terminal.say(f"logged to run {report.model.run_id} at {uri}" + "".join(f", tagged {each}" for each in tagged))
    show(report, output, terminal)
    terminal.say(
        _next_step(report, tagged, settings) or f"next: open {output / (PAGE_FILE if settings.page else REPORT_FILE)}"
    )
    return 0


def _next_step(report: "Report", tagged: Sequence[str], settings: EvaluateSettings) -> str | None:
    """The command that promotes a version that was tagged, if it may pass."""
    trusted = report.audit is not None and report.audit.trusted
    if not (tagged and trusted and report.is_as_trained):
        return None
    asked = f"{report.model.name}/{report.model.version}"
    name, _, version = (asked if asked in tagged else tagged[-1]).rpartition("/")
    arguments = ["--model", name, "--version", version]
    if settings.tracking.uri is not None:
        arguments += ["--tracking.uri", settings.tracking.uri]
    return next_command("promote_model.py", *arguments)
