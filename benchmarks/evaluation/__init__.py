"""How fast pictures become metrics, and at which price in memory: `python -m benchmarks.evaluation`."""
