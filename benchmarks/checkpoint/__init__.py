"""Checkpoints beside DeepSpeed's, read by another layout, and killed: `python -m benchmarks.checkpoint`."""
