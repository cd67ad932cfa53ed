"""Errors that are the user's to mend: each carries the exit code a job ends with, and survives pickling."""

from typing import ClassVar


class UserError(Exception):
    """A problem the user can mend.

    Args:
        subject: What is wrong: a configuration field as spelled on the command line, a path, an address.
        value: The offending value as the user gave it, or ``None`` when there is none.
        reason: Why it cannot be used.
        remedy: What to do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, subject: str, value: object, reason: str, remedy: str) -> None:
        # All arguments go to Exception, so that the error pickles: it crosses process boundaries under Ray.
        super().__init__(subject, value, reason, remedy)
        self.subject, self.value, self.reason, self.remedy = subject, value, reason, remedy

    def __str__(self) -> str:
        head = self.subject if self.value is None else f"{self.subject}={self.value}"
        return f"{head}: {self.reason}; {self.remedy}"


class ConfigError(UserError):
    """The configuration is wrong (exit code 2)."""

    exit_code: ClassVar[int] = 2


class UnavailableError(UserError):
    """Something the run needs is not there: data, a server, a bucket, a GPU (exit code 3)."""

    exit_code: ClassVar[int] = 3
