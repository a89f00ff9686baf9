"""How fast pictures stream from S3 into batches: `python -m benchmarks.data_stream`."""
