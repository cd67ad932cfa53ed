"""Candidates in another process: they run there, raise here, and end with the block or with this process."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from benchmarks.elsewhere import elsewhere
from benchmarks.timing import take_turns
from tla_service.errors import ConfigError

pytestmark = pytest.mark.distributed


def candidates(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    def fail() -> None:
        raise ConfigError("epochs", 0, "there is none", "give more")

    def work() -> None:
        began = time.process_time()
        while time.process_time() - began < 0.05:
            pass

    yield "tell", lambda: (folder / "seen").write_text(f"{os.getpid()} {gc.isenabled()}")
    yield "fail", fail
    yield "work", work
    yield "die", lambda: os._exit(3)


def not_built() -> Iterator[tuple[str, Callable[[], object]]]:
    raise EOFError("no candidates today")
    yield


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process is forked, and need not import anything."""
    made = SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"))
    monkeypatch.setattr("benchmarks.elsewhere.multiprocessing", made)


@pytest.mark.usefixtures("forked")
def test_candidates_run_in_a_process_of_their_own_that_ends_with_the_block(tmp_path: Path) -> None:
    with elsewhere(candidates, tmp_path) as found:
        assert list(found) == ["tell", "fail", "work", "die"]
        found["tell"]()
        pid, collects = (tmp_path / "seen").read_text().split()
        assert int(pid) not in (os.getpid(), os.getppid())
        assert psutil.Process(int(pid)).ppid() == os.getpid()
        assert collects == "False"
    assert not psutil.pid_exists(int(pid))
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_an_error_there_is_raised_here_and_the_others_go_on(tmp_path: Path) -> None:
    with elsewhere(candidates, tmp_path) as found:
        with pytest.raises(ConfigError, match="epochs=0") as caught:
            found["fail"]()
        assert "in fail" in caught.value.__notes__[0]
        found["tell"]()
    with pytest.raises(EOFError, match="no candidates today"), elsewhere(not_built):
        pass


@pytest.mark.usefixtures("forked")
def test_a_process_that_dies_is_told_of(tmp_path: Path) -> None:
    with elsewhere(candidates, tmp_path) as found:
        for name in ("die", "tell"):
            with pytest.raises(RuntimeError, match="is gone"):
                found[name]()


@pytest.mark.usefixtures("forked")
def test_cpu_time_is_that_of_the_process_where_it_was_spent(tmp_path: Path) -> None:
    with elsewhere(candidates, tmp_path) as found:
        times = take_turns({"there": found["work"], "nothing": lambda: None}, rounds=2, burn_in=1)
    assert min(times.cpu["there"]) >= 0.05
    assert found["work"].cpu_seconds >= 0.15
    assert max(times.cpu["nothing"]) < 0.05


@pytest.mark.slow
def test_it_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    code = f"""
import pathlib, time
from tests.benchmarks.test_elsewhere import candidates
from benchmarks.elsewhere import elsewhere
if __name__ == "__main__":
    with elsewhere(candidates, pathlib.Path({str(tmp_path)!r})) as found:
        found["tell"]()
        print("told", flush=True)
        time.sleep(100)
"""
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"told\n"
        child = psutil.Process(int((tmp_path / "seen").read_text().split()[0]))
        assert child.ppid() == parent.pid
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not ended(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ended(child)


def ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.usefixtures("forked")
def test_it_ends_with_the_block_though_a_forked_process_holds_the_pipe(tmp_path: Path) -> None:
    """As the loader processes of a step that streams its images do."""
    with elsewhere(candidates, tmp_path):
        holder = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        holder.start()
    assert holder.is_alive()
    holder.kill()
    holder.join()
