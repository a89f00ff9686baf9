"""How fast shards are built: `python -m benchmarks.data_build`.

A package, not a module: the processes that a build starts import a main module anew, and with it all that the
benchmark itself needs and no builder has; of a package they import nothing (`multiprocessing`, "spawn").
"""
