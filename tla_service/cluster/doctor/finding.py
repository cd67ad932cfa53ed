"""What a check found, and the table of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        check: What was looked at.
        where: Node address, `driver` or `workers`.
        state: `ok`; `note`, nothing to do; `warn`, it works badly; `FAIL`, training would fail.
        detail: What was seen, with figures.
        remedy: What to do about it; empty for `ok` and `note`.
    """

    check: str
    where: str
    state: State
    detail: str
    remedy: str = ""


def table(findings: Sequence[Finding]) -> str:
    """The findings in columns, remedies below what they mend."""
    widths = [max(len(getattr(finding, name)) for finding in findings) for name in ("check", "where")]
    lines = []
    for finding in findings:
        lines.append(
            f"{finding.check:<{widths[0]}}  {finding.where:<{widths[1]}}  {finding.state:<4}  {finding.detail}"
        )
        if finding.remedy:
            lines.append(f"{'':{sum(widths) + 10}}-> {finding.remedy}")
    return "\n".join(lines)


def verdict(findings: Sequence[Finding]) -> str:
    """One line to end with."""
    counts = {state: sum(finding.state == state for finding in findings) for state in ("FAIL", "warn")}
    if not any(counts.values()):
        return "all is well"
    return f"{counts['FAIL']} checks failed, {counts['warn']} gave a warning"
