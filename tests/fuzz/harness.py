"""Runs seeded cases of bad input through a job's entry point, and judges how each ends.

A case is a function of a seed and a number. A failure prints both; `TLA_FUZZ_SEED=0 TLA_FUZZ_CASE=17 pytest FILE` runs
that case alone, and `TLA_FUZZ_SEED=7 make fuzz` draws other cases. A few of each kind are part of the default suite.
"""

import contextlib
import io
import os
import random
import re
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tla_service.job import run_job

SEED = os.environ.get("TLA_FUZZ_SEED", "0")
SECONDS = 10  # of CPU time, since the machine may be busy
HUNG_SECONDS = 60
MOST_BYTES = 2**30  # of additional memory
LONGEST_MESSAGE = 2000
CHUNK = 50  # cases per test
JUDGED: dict[int, "Ended"] = {}  # cases of the test that runs now, by number


class Accepted(BaseException):
    """Raised in place of what a job does once it has accepted its input; no `except Exception` catches it."""


class Slow(BaseException):
    """A case has run for too long."""


@dataclass(frozen=True)
class Ended:
    """How a case ended: the exit code, None if its input was accepted, and what it printed to stderr."""

    code: int | None
    text: str
    seconds: float  # of CPU time
    extra_bytes: int
    hung: bool

    @property
    def fault(self) -> str:
        """What is wrong with a refusal; empty if nothing is."""
        errors = [line for line in self.text.splitlines() if line.startswith("error: ")]
        checks = {
            "hung": self.hung,
            "accepted": self.code is None or self.code == 0,
            f"exit code {self.code}": self.code not in (2, 3),
            "traceback": "Traceback" in self.text,
            f"{len(errors)} messages": len(errors) != 1,
            "no field, reason and remedy": not all(re.fullmatch(r"error: .+: .+; .+", error) for error in errors),
            "message of several lines": self.text.strip().count("\n") > 0 and "WARN" not in self.text,
            "unprintable characters": not self.text.replace("\n", "").isprintable(),
            f"{len(self.text)} characters": len(self.text) > LONGEST_MESSAGE,
        }
        return next((name for name, wrong in checks.items() if wrong), "") or self.excess

    @property
    def excess(self) -> str:
        """Which bound was exceeded, whether the input was accepted or not."""
        if self.seconds > SECONDS:
            return f"{self.seconds:.0f} s"
        if self.hung:
            return "hung"
        return f"{self.extra_bytes / 1e6:.0f} MB" if self.extra_bytes > MOST_BYTES else ""


def run_case(main: Callable[[], Any]) -> Ended:
    """Run a job's main function on bad input, for `HUNG_SECONDS` at most."""
    printed, code = io.StringIO(), None

    def stop(*_: object) -> None:
        raise Slow

    hung, before, begin = True, signal.signal(signal.SIGALRM, stop), time.process_time()
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_REAL, HUNG_SECONDS)
    # More memory than any case may take raises MemoryError, instead of bringing the machine down.
    limit = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 8 * MOST_BYTES, limit[1]))
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(printed),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.suppress(Slow),
        ):
            warnings.simplefilter("ignore")
            with contextlib.suppress(Accepted):
                code = run_job(lambda: main() and None)
            hung = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limit)
        signal.signal(signal.SIGALRM, before)
    extra = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used)
    return Ended(code or None, printed.getvalue(), time.process_time() - begin, extra, hung)


def chunks(count: int, sample: int) -> Any:
    """Parametrizes a test over chunks of case numbers: a small one in the default suite, all in the fuzz suite."""
    only = os.environ.get("TLA_FUZZ_CASE")
    whole = [
        pytest.param(range(start, min(start + CHUNK, count)), id=str(start), marks=pytest.mark.fuzz)
        for start in range(0, count, CHUNK)
    ]
    few = range(0, count, count // sample + 1) if only is None else [int(only)]
    return pytest.mark.parametrize("numbers", [pytest.param(few, id="sample"), *whole])


def random_of(kind: str, number: int) -> random.Random:
    """The generator of one case."""
    return random.Random(f"{SEED}/{kind}/{number}")


class Faults:
    """Collects faults, so that one run finds more than one; fails at the end if there are any."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def __enter__(self) -> "Faults":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self.found:
            pytest.fail(f"{len(self.found)} faults\n" + "\n".join(self.found))

    def add(self, fault: str, number: int, case: object, ended: Ended) -> None:
        """Note how a case ended, and its fault, if it is one."""
        JUDGED[number] = ended
        if fault:
            self.found.append(
                f"TLA_FUZZ_SEED={SEED} TLA_FUZZ_CASE={number}: {fault}\n  {case!r:.600}\n  {ended.text[-600:]}"
            )


def mutated(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """Damage that any format can suffer: cut off, bytes flipped, lost, repeated, zeroed or inserted."""
    kind = rng.choice(["cut", "flip", "flips", "lose", "repeat", "zero", "insert", "empty", "other"])
    place = rng.randrange(len(content))
    end = min(len(content), place + rng.randrange(1, 64))
    damaged = bytearray(content)
    if kind == "cut":
        damaged = damaged[:place]
    elif kind in ("flip", "flips"):
        for at in [place, *(rng.randrange(len(content)) for _ in range(0 if kind == "flip" else 19))]:
            damaged[at] ^= rng.randrange(1, 256)
    elif kind == "lose":
        del damaged[place:end]
    elif kind == "repeat":
        damaged[place:place] = damaged[place:end]
    elif kind == "zero":
        damaged[place:end] = bytes(end - place)
    elif kind == "insert":
        damaged[place:place] = rng.randbytes(rng.randrange(1, 64))
    else:
        damaged = bytearray(b"" if kind == "empty" else rng.randbytes(len(content)))
    return f"{kind} at {place}", bytes(damaged)


@contextlib.contextmanager
def environment(variables: dict[str, str], arguments: list[str], folder: Path) -> Iterator[None]:
    """A command line and environment variables, in a folder."""
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        for name, value in variables.items():
            patch.setenv(name, value)
        patch.setattr("sys.argv", ["job.py", *arguments])
        yield
