"""`python -m benchmarks.checkpoint`."""

from benchmarks.checkpoint.command import main

if __name__ == "__main__":
    main()
