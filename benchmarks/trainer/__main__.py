"""`python -m benchmarks.trainer`."""

from benchmarks.trainer.command import main

if __name__ == "__main__":
    main()
