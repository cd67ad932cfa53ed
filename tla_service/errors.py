"""Errors that are the user's to mend, each with the exit code a job ends with; retries of those that may pass."""

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator
from typing import ClassVar, TypeVar

LONGEST_WAIT_SECONDS = 30.0
_log = logging.getLogger(__name__)
T = TypeVar("T")
# user:password@ of an address, also where the password has a slash (but not host:port/a@b), or the scheme was forgotten
# (but not name:tag@sha256:...); and what a query calls a password, key, token, secret or signature.
_CREDENTIALS = re.compile(
    r"(?<=://)[^/?#\s]*@"
    r"|(?<=://)[^/?#\s:@\[]+:(?!\d+[/?#])[^\s@\"']+@(?=[\w.\[-])"
    r"|(?<![\w@:])[\w.+-]+:[^\s/@:\"']+@(?!sha\d+:)(?=[\w-])"
    r"|(?<=[?&])([\w-]*"
    r"(?:password|passwd|pwd|key|token|secret|signature|sig|credential)[\w-]*=)[^&\s\"']+",
    re.IGNORECASE,
)


def without_credentials(text: str) -> str:
    """Text with user names, passwords and keys removed from every URL in it, for terminals, logs and MLflow."""
    return _CREDENTIALS.sub(r"\1", text)


def one_line(error: BaseException, limit: int = 200) -> str:
    """An error's text without line breaks and credentials, cut to ``limit`` characters."""
    text = without_credentials(" ".join(str(error).split()))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _shown(value: object, limit: int = 300) -> str:
    """A value in one line for terminals: control characters are escaped, and the middle of a long one is left out."""
    text = str(value)
    text = text if len(text) <= limit else f"{text[: limit - 50]}...{text[-40:]} ({len(text)} characters)"
    return "".join(
        each if each.isprintable() else " " if each.isspace() else each.encode("unicode_escape").decode()
        for each in text
    )


class UserError(Exception):
    """A problem the user can mend. Credentials in URLs are removed from its texts.

    Args:
        subject: What is wrong: a configuration field as spelled on the command line, a path, an address.
        value: The offending value as the user gave it; None if there is none.
        reason: Why it cannot be used.
        remedy: What to do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, subject: str, value: object, reason: str, remedy: str) -> None:
        # All arguments go to Exception, so that the error pickles: it crosses process boundaries under Ray.
        value = without_credentials(value) if isinstance(value, str) else value
        reason, remedy = without_credentials(reason), without_credentials(remedy)
        super().__init__(subject, value, reason, remedy)
        self.subject, self.value, self.reason, self.remedy = subject, value, reason, remedy

    def __str__(self) -> str:
        head = _shown(self.subject) if self.value is None else f"{_shown(self.subject)}={_shown(self.value)}"
        return f"{head}: {_shown(self.reason, 1000)}; {_shown(self.remedy, 500)}"


class ConfigError(UserError):
    """The configuration is wrong (exit code 2)."""

    exit_code: ClassVar[int] = 2


class OutOfMemoryError(ConfigError):
    """A worker does not have the memory that the configuration takes."""


class UnavailableError(UserError):
    """Something the run needs is not there: data, a server, a bucket, a GPU (exit code 3)."""

    exit_code: ClassVar[int] = 3


@contextlib.contextmanager
def readable(subject: str, value: object, remedy: str) -> Iterator[None]:
    """Raise UnavailableError for any error that files raise which are not what they should be."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # readers of damaged files let errors of many kinds through
        reason = f"cannot be read ({type(error).__name__}: {one_line(error)})"
        raise UnavailableError(subject, value, reason, remedy) from error


def retried(what: str, action: Callable[[], T], may_pass: Callable[[Exception], bool], *, seconds: float) -> T:
    """Call `action`; for some seconds after a first error, repeat it if errors `may_pass`, waiting longer each time."""
    deadline, wait = None, 1.0
    while True:
        try:
            return action()
        except Exception as error:
            if deadline is None:  # not before, as a busy server's first time-out may take longer than that
                deadline = time.monotonic() + seconds
            if not may_pass(error) or time.monotonic() + wait > deadline:
                raise
            _log.warning("%s failed (%s); trying again in %.0f s", what, one_line(error), wait)
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)
