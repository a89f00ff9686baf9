"""The whole training loop beside its bare step and a peer's loop: `python -m benchmarks.trainer`."""
