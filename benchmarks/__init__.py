"""What the performance claims are measured with; not part of the package. See docs/benchmarks.md."""
