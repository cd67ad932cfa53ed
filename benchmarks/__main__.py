"""Measure training speed and compare with the ratios kept in the repository.

python -m benchmarks --output docs/results/performance-cpu.json
python -m benchmarks --device cuda --output docs/results/performance-gpu.json

Tables are printed as they are measured; docs/make_performance.py writes them into the documentation.
"""

import sys

from benchmarks.settings import BenchmarkSettings
from tla_service.config.loading import read_settings
from tla_service.job import run_job


def main() -> int:
    """Read the settings, measure, and report worsened ratios."""
    settings = read_settings(BenchmarkSettings)
    # Imported late: --help should not wait for torch.
    from benchmarks.run import run_benchmark

    return run_benchmark(settings)


if __name__ == "__main__":
    sys.exit(run_job(main))
