"""What the audit found, as plain data: a part of `report.json`."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator


class Part(BaseModel):
    """A part of a report; figures that are undefined are None, as JSON has no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


class CheckFacts(Part):
    """One check of the audit; `figure` is None where it was not run."""

    name: str
    figure: float | None
    threshold: float
    outcome: Literal["passed", "failed", "not run"]
    statement: str
    meaning: str

    @model_validator(mode="before")
    @classmethod
    def _of_an_earlier_version(cls, values: Any) -> Any:
        """Reports once said `passed`, and counted a check without a figure as failed."""
        if not (isinstance(values, dict) and "passed" in values):
            return values
        run = "passed" if values["passed"] else "not run" if values.get("figure") is None else "failed"
        return {name: value for name, value in values.items() if name != "passed"} | {"outcome": run}


class SurrogateFacts(Part):
    """The surrogate that was trained for the audit, as none was given.

    Attributes:
        architecture: Name of the network.
        images: Number of training images.
        steps: Optimizer steps.
        seconds: Wall time of its training.
        clean_accuracy: On held-out training images.
        held_out: Their number.
    """

    architecture: str
    images: int
    steps: int
    seconds: float
    clean_accuracy: float | None
    held_out: int


class AuditFacts(Part):
    """Whether the robustness is real.

    Attributes:
        trusted: Whether no check failed. One that was not run says nothing, and is shown as such.
        images: How many images it was measured on.
        checks: In the order of running.
        surrogate: What attacks were transferred from, if it was trained for this audit.
    """

    trusted: bool
    images: int
    checks: tuple[CheckFacts, ...]
    surrogate: SurrogateFacts | None = None

    def named(self, outcome: Literal["passed", "failed", "not run"]) -> list[str]:
        """Names of the checks with an outcome."""
        return [check.name for check in self.checks if check.outcome == outcome]

    @property
    def summary(self) -> str:
        """How many checks had each outcome; those that did not pass by name."""
        parts = [f"{len(self.named('passed'))} of {len(self.checks)} checks passed"]
        for outcome in ("failed", "not run"):
            names = self.named(outcome)
            if names:
                parts.append(f"{len(names)} {outcome} ({', '.join(names)})")
        return ", ".join(parts)
