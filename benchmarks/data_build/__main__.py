"""`python -m benchmarks.data_build`."""

from benchmarks.data_build.command import main

if __name__ == "__main__":
    main()
