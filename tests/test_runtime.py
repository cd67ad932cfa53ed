"""Memory that is kept between steps, seen by the page faults that it saves; and what the hardware is called."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from tla_service.runtime import hardware

_FAULTS = """
import resource, sys, torch
from tla_service.runtime import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
for turn in range(40):
    if turn == 30:  # the first ones have to take new pages, until one that was freed is large enough
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = torch.ones(12_000_000)
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have their own ways")
def test_kept_memory_is_used_again_without_page_faults() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    pages = 10 * 48_000_000 // 4096
    assert faults("default") > pages // 2
    assert faults("kept") < pages // 100


def test_a_processor_has_a_name_and_cores() -> None:
    name, _, cores = hardware(torch.device("cpu")).rpartition(", ")
    assert name
    assert cores == f"{os.cpu_count()} cores"
