"""Run a campaign of faults and write docs/reliability.md; requires root (for networks of nodes) and PostgreSQL.

    python -m tests.chaos --seeds 50

Seeds whose results are there already are not repeated.
"""

import argparse
import signal
from pathlib import Path

from tests.chaos.campaign import ROOT, load, play, save, undisturbed, write_page
from tests.chaos.world import world
from tla_service.training.reporting import Terminal


def main() -> None:
    """Read the arguments, play the seeds that are missing, write results and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50, help="play seeds 0 to this")
    parser.add_argument("--only", type=int, nargs="*", help="play these seeds, again if need be")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "reliability.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "reliability.md")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that servers and networks are taken down
    results = {each.seed: each for each in load(given.results)}
    wanted = given.only if given.only else [seed for seed in range(given.seeds) if seed not in results]
    if wanted:
        terminal = Terminal()
        with world() as servers:
            expected = undisturbed(servers)
            for seed in wanted:
                result = results[seed] = play(servers, seed, expected)
                terminal.say(f"seed {seed:3} {result.fault:16} {result.wall:6.1f} s  {result.trouble or 'recovered'}")
                save(given.results, [results[key] for key in sorted(results)])
    write_page([results[key] for key in sorted(results)], given.page)


if __name__ == "__main__":
    main()
