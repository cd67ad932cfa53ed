"""Replaced by `reproduce_paper.py --table digits` and, for other presets, `tune_tla.py`: prints the new command."""

import argparse
import json
import shlex
import sys

from tla_service.errors import ConfigError
from tla_service.job import run_job

METHODS = ("natural", "at", "alp", "tla", "tla_rn", "tla_sa")


def main() -> None:
    """Translate the command line.

    Raises:
        ConfigError: Always; its remedy is the command to use.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--side-by-side", type=int)
    parser.add_argument("--runs")
    parser.add_argument("--output")
    given, others = parser.parse_known_args()
    if given.preset == "digits" and not others:
        command = ["reproduce_paper.py", "--table", "digits", "--seeds", str(given.seeds)]
        flags = {"--side_by_side": given.side_by_side, "--state": given.runs, "--output": given.output}
        command += [str(each) for flag, value in flags.items() if value is not None for each in (flag, value)]
        command += ["--methods", *given.methods] if given.methods != METHODS else []
    else:
        space = json.dumps({"method": given.methods, "seed": list(range(given.seeds))})
        command = ["tune_tla.py", "--preset", given.preset, "--sweep.space", space, "--sweep.measure_test", *others]
        command += ["--sweep.searcher", "grid", "--sweep.scheduler", "none"]
    new = f"python jobs/{shlex.join(command)}"
    raise ConfigError("compare_methods.py", None, "has been replaced", f"use: {new}")


if __name__ == "__main__":
    sys.exit(run_job(main))
