"""What a process that makes features is told, and what it answers."""

from benchmarks.harness import Record


class FeatureJob(Record):
    """Who runs in a process.

    Attributes:
        contender: `OURS` or a peer's name.
        threads: Of torch and of the linear algebra beneath numpy and scipy.
        small: Take a small network and fewer configurations.
    """

    contender: str
    threads: int
    small: bool


class Configuration(Record):
    """How somebody runs.

    Attributes:
        contender: `OURS` or a peer's name.
        name: In tables: who, and how it runs.
        workers: Whether it starts worker processes.
        in_process: Whether the resize happens in its first process, so that it is on the clock.
    """

    contender: str
    name: str
    workers: bool
    in_process: bool


class Call(Record):
    """What one call cost.

    Attributes:
        wall: Wall seconds.
        cpu: Processor seconds, those of worker processes included.
        network: Wall seconds inside the network.
        resize: The same for the resize, as far as the first process does it.
    """

    wall: float
    cpu: float
    network: float
    resize: float
