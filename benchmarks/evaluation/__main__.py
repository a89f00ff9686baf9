"""`python -m benchmarks.evaluation`."""

from benchmarks.evaluation.command import main

if __name__ == "__main__":
    main()
