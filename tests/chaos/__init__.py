"""A campaign of seeded faults against real runs: `python -m tests.chaos`."""
