"""Memory that is kept between steps, seen by the page faults that it saves; and what the hardware is called."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from tla_service.errors import UnavailableError
from tla_service.runtime import hardware, process_group

_FAULTS = """
import resource, torch
from tla_service.runtime import keep_freed_memory

def faults():
    for turn in range(40):
        if turn == 30:  # the first ones have to take new pages, until one that was freed is large enough
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = torch.ones(12_000_000)
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
keep_freed_memory()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have their own ways")
def test_kept_memory_is_used_again_without_page_faults() -> None:
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True)
    default, kept = map(int, done.stdout.split())
    pages = 10 * 48_000_000 // 4096
    assert default > pages // 2
    assert kept < pages // 100


def test_a_processor_has_a_name_and_cores() -> None:
    name, _, cores = hardware(torch.device("cpu")).rpartition(", ")
    assert name
    assert cores == f"{os.cpu_count()} cores"


def test_a_process_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    expected = r"scaling\.use_gpu: 3 processes or more .* sees 2 GPUs; start torchrun with --nproc-per-node 2, or"
    with pytest.raises(UnavailableError, match=expected), process_group(torch.device("cuda"), 60):
        pass
