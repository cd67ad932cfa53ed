"""A soak: a run of as many steps as three hours of training have, and thousands of checkpoints; its memory stays flat.

    python -m tests.chaos.soak

Writes its part of docs/reliability.md. The steps are short, so that they take minutes.
"""

import argparse
import contextlib
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos.campaign import ROOT, commit, write_part
from tests.cluster.conftest import Job
from tla_service.training.reporting import Terminal

# A checkpoint with every record of the log, of 1-step attacks on batches of 8 images.
FLAGS = (
    "--preset digits --attack.num_steps 1 --training.global_batch_size 8 "
    "--training.log_every_steps 75 --training.checkpoint_minutes 0.0001 --evaluation.every_epochs 100 "
    "--evaluation.validation.num_steps 2 --scaling.num_workers 2"
)
STEP_SECONDS = 0.034  # of the preset itself, on one core
SECONDS_BETWEEN = 5.0
WARM_UP = 0.2  # part of the run after which memory may no longer grow: allocators and caches have filled by then
MOST_GROWTH = 0.05  # of the last fifth over the fifth after the warm-up


@dataclass(frozen=True)
class Sample:
    """What all processes of a run use: bytes of memory that are theirs alone, open files, bytes on the disk."""

    step: int
    memory: int
    files: int
    disk: int


def processes(job: Job) -> Iterator[psutil.Process]:
    """The job and what it started."""
    yield psutil.Process(job.process.pid)
    yield from psutil.Process(job.process.pid).children(recursive=True)


def sample(job: Job, step: int, folder: Path) -> Sample:
    """Measure now; processes and files that go away meanwhile do not count."""
    memory = files = disk = 0
    for process in processes(job):
        with contextlib.suppress(psutil.Error):
            memory += process.memory_full_info().uss
            files += process.num_fds()
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            disk += path.stat().st_size if path.is_file() else 0
    return Sample(step, memory, files, disk)


def soak(epochs: int, folder: Path, terminal: Terminal) -> tuple[list[Sample], int, float]:
    """Samples of a run, its checkpoints, and its wall time in seconds."""
    (folder / "job").mkdir()
    (folder / "tmp").mkdir()
    places = {"RAY_TMPDIR": str(folder), "TMPDIR": str(folder / "tmp")}
    began, samples = time.monotonic(), []
    job = Job(folder / "job", "--training.epochs", str(epochs), preset=FLAGS.split(), environment=places)
    try:
        while job.process.poll() is None:
            step = max((record["step"] for record in job.records() if record["event"] == "step"), default=0)
            if step:
                samples.append(sample(job, step, folder))
                terminal.say(str(samples[-1]))
            time.sleep(SECONDS_BETWEEN)
        printed = job.wait()
        assert job.process.returncode == 0, printed
        saved = sum(record["event"] == "step" or record.get("checkpoint", False) for record in job.records())
    finally:
        job.end()
    return samples, saved, time.monotonic() - began


def ends(values: list[int]) -> tuple[float, float]:
    """The median of the fifth after the warm-up, and that of the last fifth."""
    fifth = len(values) // 5
    return statistics.median(values[int(len(values) * WARM_UP) :][:fifth]), statistics.median(values[-fifth:])


def growth(values: list[int]) -> float:
    """Of the one over the other."""
    first, last = ends(values)
    return last / first - 1


def part(samples: list[Sample], checkpoints: int, seconds: float) -> str:
    """Its part of the page."""
    lines = [
        f"{samples[-1].step:,} steps, those of {samples[-1].step * STEP_SECONDS / 3600:.1f} hours, and {checkpoints:,} "
        f"checkpoints in {seconds / 60:.0f} minutes, at {commit()}:",
        "",
        f"| of all processes | after {WARM_UP:.0%} of the run | at its end | growth |",
        "|---|---|---|---|",
    ]
    units = {"memory": (2**20, "MB of memory"), "files": (1, "open files"), "disk": (2**20, "MB on the disk")}
    for name, (unit, words) in units.items():
        values = [getattr(each, name) for each in samples]
        first, last = ends(values)
        lines.append(f"| {words} | {first / unit:.0f} | {last / unit:.0f} | {growth(values):+.1%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Soak, write the page, and fail if memory or open files have grown."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the job is ended, too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2100)
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reliability.md")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as folder:  # Ray's sockets need a short path
        samples, checkpoints, seconds = soak(given.epochs, Path(folder), Terminal())
    write_part(given.page, "soak", part(samples, checkpoints, seconds))
    grown = {name: growth([getattr(each, name) for each in samples]) for name in ("memory", "files")}
    assert max(grown.values()) < MOST_GROWTH, grown


if __name__ == "__main__":
    main()
