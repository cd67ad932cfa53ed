"""Mining a large pool in bounded memory, measured in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import torch
from benchmarks.timing import peak_memory
from tla_service.triplets import mine_hardest
torch.set_num_threads(1)
anchors, pool = torch.randn(1024, 640), torch.randn(10_000, 640)
labels, pool_labels = torch.arange(1024) % 10, torch.arange(10_000) % 10
mine_hardest(anchors[:2], labels[:2], pool[:2], pool_labels[:2])
with peak_memory() as memory:
    mine_hardest(anchors, labels, pool, pool_labels)
print(memory[0] / 2**20)
"""


def test_a_pool_of_ten_thousand_takes_a_few_hundred_mebibytes() -> None:
    """A matrix of all pairs is 39 MiB; a tensor of all triplets would be 4 TiB."""
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=environment)
    assert 10 < float(done.stdout) < 300
