"""A source of pictures -> shards, records and, last of all, the index; see `run` for how it goes."""

from data_pipeline.build.plan import BuildOptions
from data_pipeline.build.run import REJECTED_FILE, Grain, build, default_workers, find_built

__all__ = ["REJECTED_FILE", "BuildOptions", "Grain", "build", "default_workers", "find_built"]
