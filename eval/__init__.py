"""Evaluation: checkpoints in, results out; it meets the trainer only in the run directory.

The package's name shadows a builtin, so import from its rooms only: `from eval.service import watch`.
"""
