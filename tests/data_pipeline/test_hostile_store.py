"""Streaming through a proxy that does harm: every kind of fault happens, is counted, and changes nothing."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from s3fs import S3FileSystem

from data_pipeline import ImageStream
from data_pipeline.errors import StorageFault, UserError
from data_pipeline.index import load_index, load_records
from data_pipeline.storage import Storage
from data_pipeline.storage_backend import StorageBackend
from data_pipeline.substitutes import Substitution, Substitutions
from launch.s3server import S3Server
from tests.fault_plan import Fault, always, first, flip_member, random_faults
from tests.fault_proxy import FaultProxy

BACKENDS = list(StorageBackend)


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server, digits_url: str) -> Iterator[FaultProxy]:
    """A proxy before the S3 server, at which the environment points; the digits lie there as `/hostile`."""
    storage = Storage(f"{s3_server.url}/hostile")
    for file in Path(digits_url).iterdir():
        storage.upload(file.name, file)
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        S3FileSystem.clear_instance_cache()  # of clients that know the server itself
        yield proxy
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def hostile_url(proxy: FaultProxy, s3_server: S3Server) -> Iterator[str]:
    proxy.plan = None
    proxy.reset_counters()
    yield f"{s3_server.url}/hostile"
    proxy.plan = None


def take(storage: Storage | str, batches: int = 6, **options: object) -> list[bytes]:
    chosen = {"seed": 2, "global_batch": 120, "window_shards": 4, **options}
    with ImageStream(storage, **chosen) as stream:  # type: ignore[arg-type]
        return [next(stream).images.tobytes() for _ in range(batches)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", list(Fault))
def test_each_kind_of_fault_is_survived_and_counted(
    proxy: FaultProxy, hostile_url: str, digits_url: str, kind: Fault, backend: StorageBackend
) -> None:
    proxy.plan = first(3, kind)
    storage = Storage(hostile_url, backend=backend, request_timeout=0.5)
    with ImageStream(storage, seed=2, global_batch=120, window_shards=4) as stream:
        got = [next(stream).images.tobytes() for _ in range(6)]
    assert got == take(digits_url)
    assert proxy.counters().faults[kind] == 3
    if kind is Fault.FLIP:
        # A bit that is turned between two members, in a header or padding, hurts nobody.
        assert stream.counts.retries == 0
    else:
        assert stream.counts.retries >= 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_faults_at_once(
    proxy: FaultProxy, hostile_url: str, digits_url: str, backend: StorageBackend
) -> None:
    kinds = [kind for kind in Fault if kind is not Fault.STALL]
    proxy.plan = random_faults(4, 0.3, kinds)
    got = take(Storage(hostile_url, backend=backend), 16, prefetch_bytes=100_000)
    assert got == take(digits_url, 16)
    assert set(proxy.counters().faults) == set(kinds)


def test_a_store_that_stays_away_ends_in_one_line(proxy: FaultProxy, hostile_url: str) -> None:
    proxy.plan = always(Fault.UNAVAILABLE)
    with pytest.raises(StorageFault, match=r"\.tar: still failing after retries: .*reduce your request rate"):
        take(Storage(hostile_url, give_up_after=1.0))
    assert proxy.counters().faults[Fault.UNAVAILABLE] > 1


def test_secrets_are_in_no_message(
    proxy: FaultProxy, hostile_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.plan = first(2, Fault.UNAVAILABLE)
    for backend in BACKENDS:
        take(Storage(hostile_url, backend=backend), 1)
    assert caplog.text
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in caplog.text
    assert os.environ["AWS_ACCESS_KEY_ID"] not in caplog.text


def damaged(url: str, shard: int, member: int) -> tuple[str, int, int]:
    """Name and bytes of a member, for `flip_member`."""
    loaded = load_index(url)
    entry = loaded.shards("train")[shard]
    record = load_records(loaded, entry)[member]
    return entry.name, int(record["offset"]), int(record["offset"] + record["size"])


EPOCH_BATCHES = 13


def test_lasting_damage_gives_way_to_one_substitute_for_everybody(
    proxy: FaultProxy, hostile_url: str, digits_url: str, tmp_path: Path
) -> None:
    proxy.plan = flip_member(*damaged(digits_url, 1, 17))
    storage = Storage(str(tmp_path / "substitutions"))
    with_damage = take(Storage(hostile_url), EPOCH_BATCHES, substitutions=Substitutions(storage, 5))
    assert proxy.counters().faults[Fault.FLIP] >= 5, "it was read again and again, on its own"
    names = storage.list()
    name = names[0]  # the others are of later epochs, read ahead
    made = Substitution.from_json(storage.read(name), name)
    assert (made.shard, made.member) == (1, 17)

    clean = take(digits_url, EPOCH_BATCHES)
    batch, place = divmod(made.position, 120)
    for number, (mine, theirs) in enumerate(zip(with_damage, clean, strict=True)):
        differ = np.flatnonzero(
            (np.frombuffer(mine, np.uint8) != np.frombuffer(theirs, np.uint8)).reshape(120, -1).any(axis=1)
        )
        assert differ.tolist() == ([place] if number == batch else [])

    # Mended or not, by any number of ranks, what was published holds.
    proxy.plan = None
    two = [
        take(
            Storage(hostile_url),
            EPOCH_BATCHES,
            substitutions=Substitutions(storage, 5),
            rank=rank,
            world=2,
        )
        for rank in range(2)
    ]
    assert [b"".join(parts) for parts in zip(*two, strict=True)] == with_damage
    assert name in storage.list()


def test_known_damage_is_not_tried_again_and_every_position_is_published(
    proxy: FaultProxy, hostile_url: str, digits_url: str, tmp_path: Path
) -> None:
    proxy.plan = flip_member(*damaged(digits_url, 0, 3))
    substitutions = Substitutions(Storage(str(tmp_path / "s")), 5)
    with ImageStream(
        Storage(hostile_url),
        seed=2,
        global_batch=120,
        window_shards=4,
        substitutions=substitutions,
        prefetch_bytes=100_000,  # so that an epoch is not read before the damage of the last one is known
    ) as stream:
        for _ in range(3 * EPOCH_BATCHES):
            next(stream)
        counts = stream.counts
    assert counts.substitutions >= 3
    assert 4 <= counts.rereads < 4 * counts.substitutions, "not at every meeting"
    assert proxy.counters().faults[Fault.FLIP] >= 3
    names = Storage(str(tmp_path / "s")).list()
    assert len(names) >= 3, "once an epoch"
    assert len({name.split("-", 1)[1] for name in names}) == 1


def test_more_damage_than_the_budget_stops_the_stream(
    proxy: FaultProxy, hostile_url: str, digits_url: str, tmp_path: Path
) -> None:
    proxy.plan = flip_member(*damaged(digits_url, 2, 9))
    storage = Storage(str(tmp_path / "s"))
    with pytest.raises(UserError, match=r"1 members .* damaged in the store, data.damage_budget allows 0"):
        take(Storage(hostile_url), EPOCH_BATCHES, substitutions=Substitutions(storage, 0))
    assert proxy.counters().faults[Fault.FLIP] >= 3
    with pytest.raises(UserError, match="damage_budget allows 0"):
        Substitutions(storage, 0)


def test_without_a_place_for_substitutions_damage_ends_the_stream(
    proxy: FaultProxy, hostile_url: str, digits_url: str
) -> None:
    proxy.plan = flip_member(*damaged(digits_url, 2, 9))
    with pytest.raises(StorageFault, match=r"member 9: checksum wrong in 5 independent reads"):
        take(Storage(hostile_url), EPOCH_BATCHES)
    assert proxy.counters().faults[Fault.FLIP] >= 3


def test_a_start_anywhere_reads_as_much(proxy: FaultProxy, hostile_url: str) -> None:
    """The first batch costs index, records of a window and its own members; no more is read before it."""
    size = load_index(hostile_url).index.samples("train")
    costs = []
    for share in (0.1, 0.5, 0.9):
        proxy.reset_counters()
        with ImageStream(
            Storage(hostile_url), seed=2, global_batch=32, window_shards=4, position=int(share * size)
        ) as stream:
            next(stream)
            costs.append(proxy.counters().bytes_down)
    whole = sum(entry.bytes for entry in load_index(hostile_url).shards("train"))
    assert max(costs) < whole / 4
    assert max(costs) < 2 * min(costs), "a first batch at a window's end needs the next one's records too"
