"""Metrics: pure functions of streamed statistics."""
