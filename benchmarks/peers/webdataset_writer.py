"""WebDataset's `ShardWriter`, the usual way to write shards, fed from an LMDB.

As its documentation converts ImageNet (`examples/imagenet-to-shards.ipynb`): the files' own bytes under their
extension, `encoder=False`, shards limited by `maxsize`. `verbose=0` spares it the printing; a larger
`GOPEN_BUFFER` and values as memory views were tried and change nothing. It writes in one process; writers in
several, each with keys and shard numbers of its own (`start_shard`), are what people start by hand.
"""

from pathlib import Path

import lmdb

from benchmarks.peers.distribution import LibraryPeer

WEBDATASET = LibraryPeer(
    name="webdataset", distribution="webdataset", source="https://github.com/webdataset/webdataset"
)


def write_shards(database: Path, out: Path, shard_bytes: int, part: int = 0, parts: int = 1) -> None:
    """Write the pictures of a database to `shard-NNNNNN.tar`.

    Args:
        database: Folder of the LMDB.
        out: Folder for the shards; it is there.
        shard_bytes: Size at which the next shard begins.
        part: Which part of the pictures; every `parts`-th is one of it.
        parts: How many writers there are.
    """
    from webdataset import ShardWriter

    with (
        lmdb.open(str(database), readonly=True, lock=False) as environment,
        environment.begin(buffers=True) as transaction,
        ShardWriter(
            str(out / "shard-%06d.tar"),
            maxsize=shard_bytes,
            start_shard=part * 1_000_000 // parts,
            verbose=0,
            encoder=False,
        ) as sink,
    ):
        for number, (key, value) in enumerate(transaction.cursor()):
            if number % parts == part:
                sink.write({"__key__": bytes(key).decode(), "jpg": bytes(value)})
