"""`python -m benchmarks.data_stream`."""

from benchmarks.data_stream.command import main

if __name__ == "__main__":
    main()
