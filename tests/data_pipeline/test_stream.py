import io
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data_pipeline import ImageStream
from data_pipeline.build import BuildOptions, build
from data_pipeline.device import DeviceStream
from data_pipeline.errors import StorageFault, UserError
from data_pipeline.index import load_index
from data_pipeline.mixture import source_seed
from data_pipeline.sources import Item, Source
from data_pipeline.sources.digits import DigitsSource
from data_pipeline.sources.folder import FolderSource
from data_pipeline.split_reader import read_split
from data_pipeline.stream import NO_LABEL, WeightedSource


def stream(url: object, **options: object) -> ImageStream:
    chosen = {"seed": 3, "global_batch": 100, "channels": 1, "image_size": 8, "window_shards": 3, **options}
    return ImageStream(url if isinstance(url, list) else str(url), **chosen)  # type: ignore[arg-type]


def take(url: object, count: int, **options: object) -> list[tuple[list[int], bytes]]:
    with stream(url, **options) as batches:
        return [(b.positions.tolist(), b.images.tobytes()) for b in itertools.islice(batches, count)]


def threads_alive() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("image-stream")]


def test_shapes_and_cursor(digits_url: str) -> None:
    with stream(digits_url, position=40) as batches:
        assert batches.position == 40
        batch = next(batches)
        assert batch.images.shape == (100, 8, 8, 1)
        assert batch.images.dtype == np.uint8
        assert batch.positions.tolist() == list(range(40, 140))
        assert batches.position == 140
        assert batches.wait_seconds > 0
        assert batches.index_sha == load_index(digits_url).sha256
        assert batches.epoch_size == load_index(digits_url).index.samples("train")
        assert batches.counts.rereads == 0


def test_a_small_data_set_is_not_read_for_epochs_ahead(digits_url: str) -> None:
    """However much may be held, reading stops two windows ahead; a whole epoch takes less than that here."""
    epoch = sum(entry.bytes for entry in load_index(digits_url).shards("train"))
    most = max(2 * epoch, 8 << 20)
    with stream(digits_url, prefetch_bytes=1 << 30, window_shards=100) as batches:
        for _ in range(3 * most // epoch * batches.epoch_size // 100):
            delivered = next(batches).positions[-1]
            # What was delivered and what is decoded, what may be ahead, and the requests under way.
            read = batches.counts.bytes
            assert read <= (delivered / batches.epoch_size + 3) * epoch + most, "read too far ahead"
        assert read > most, "the bound must have been reached"


def test_one_epoch_holds_every_picture_once(digits_url: str) -> None:
    size = load_index(digits_url).index.samples("train")
    with stream(digits_url, global_batch=size) as batches:
        first, second = (next(batches).images.reshape(size, -1) for _ in range(2))
    (whole,) = read_split(digits_url, "train", channels=1, image_size=8, batch=size)
    expected = sorted(image.tobytes() for image in whole)
    assert sorted(image.tobytes() for image in first) == expected
    assert sorted(image.tobytes() for image in second) == expected
    assert not np.array_equal(first, second)


def test_neither_threads_nor_prefetch_change_anything(digits_url: str) -> None:
    expected = take(digits_url, 20, threads=1, prefetch_batches=1)
    assert take(digits_url, 20, threads=4, prefetch_batches=7) == expected
    assert take(digits_url, 20, seed=4) != expected


@pytest.mark.parametrize("world", [2, 3, 7])
def test_ranks_together_are_the_global_batch(digits_url: str, world: int) -> None:
    expected = take(digits_url, 3)
    parts = [take(digits_url, 3, rank=rank, world=world) for rank in range(world)]
    for number in range(3):
        positions = [p for part in parts for p in part[number][0]]
        pictures = b"".join(part[number][1] for part in parts)
        assert (positions, pictures) == expected[number]


def test_more_ranks_than_images(digits_url: str) -> None:
    with stream(digits_url, global_batch=2, rank=2, world=3) as batches:
        assert next(batches).images.shape == (0, 8, 8, 1)


def test_resumed_at_any_position(digits_url: str) -> None:
    whole = take(digits_url, 18)  # crosses an epoch
    assert take(digits_url, 4, position=1400) == whole[14:]
    # Another batch size from there on continues the same sequence.
    finer = take(digits_url, 8, position=1400, global_batch=50)
    assert b"".join(pictures for _, pictures in finer) == b"".join(pictures for _, pictures in whole[14:])


def test_index_order_is_the_sources(digits_url: str) -> None:
    batches = list(read_split(digits_url, "val", channels=1, image_size=8, batch=64, limit=130))
    assert [len(batch) for batch in batches] == [64, 64, 2]
    pictures = {
        np.asarray(Image.open(io.BytesIO(item.data))).tobytes(): i for i, item in enumerate(DigitsSource())
    }
    numbers = [pictures[image.tobytes()] for batch in batches for image in batch]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"image_size": 16}, "holds pictures of size 8 with 1 channel.*image.size"),
        ({"channels": 3}, "asked for are size 8 with 3"),
        ({"split": "test"}, "no split 'test'"),
        ({"global_batch": 0}, "global batch"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_wishes_are_refused_at_once(digits_url: str, options: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        stream(digits_url, **options)


def test_no_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.json: no such file.*ddpm data build"):
        stream(tmp_path / "nothing")


class Mixed(Source):
    """A source whose pictures have two sizes."""

    kind = name = "mixed"
    default_val_fraction = 0.3

    def places(self) -> Iterator[int]:
        yield from range(40)

    def read(self, first: int, places: Sequence[int]) -> Iterator[Item]:
        for number in places:
            buffer = io.BytesIO()
            Image.new("RGB", (9, 8) if number == 17 else (8, 8), (number, 0, 0)).save(buffer, "PNG")
            yield Item(f"n{number}", f"n{number}", buffer.getvalue())


def test_a_picture_of_another_shape_names_shard_and_key(tmp_path: Path) -> None:
    """Shards are data from outside: here the index is made to promise what one picture does not keep."""
    build(Mixed(), str(tmp_path / "wide"), BuildOptions(size=9))
    index = tmp_path / "wide" / "index.json"
    index.write_bytes(index.read_bytes().replace(b'"size": 9', b'"size": 8'))
    with stream(tmp_path / "wide", channels=3) as batches:
        with pytest.raises(UserError, match=r"shard-00000\d\.tar member \d+ \(key 'n\d+'\): 9 x 9 pixels"):
            next(batches)
        with pytest.raises(StopIteration):
            next(batches)
    assert threads_alive() == []


def test_errors_of_the_threads_reach_the_consumer(damageable_url: Path) -> None:
    entries = load_index(str(damageable_url)).shards("train")
    (damageable_url / entries[-1].name).unlink()
    with (
        stream(damageable_url, window_shards=1) as batches,
        pytest.raises(StorageFault, match=entries[-1].name),
    ):
        list(itertools.islice(batches, 20))
    assert threads_alive() == []


def test_close_joins_the_threads_and_may_be_repeated(digits_url: str) -> None:
    batches = stream(digits_url)
    next(batches)
    assert threads_alive()
    batches.close()
    batches.close()
    assert threads_alive() == []
    assert list(batches) == []


def labelled(folder: Path) -> str:
    """A data set of class folders, in which the label is the colour."""
    for number in range(3):
        (folder / "in" / f"class{number}").mkdir(parents=True)
        for copy in range(20):
            picture = Image.new("RGB", (8, 8), (number * 50, copy, 7))
            picture.save(folder / "in" / f"class{number}" / f"{copy}.png")
    build(
        FolderSource(folder / "in", labels=True), str(folder / "out"), BuildOptions(size=8, val_fraction=0.2)
    )
    return str(folder / "out")


def test_labels_come_with_the_pictures(tmp_path: Path) -> None:
    url = labelled(tmp_path)
    with ImageStream(url, seed=1, global_batch=16, labels=True) as batches:
        for batch in itertools.islice(batches, 6):
            assert batch.labels.tolist() == (batch.images[:, 0, 0, 0] // 50).tolist()
    with ImageStream(url, seed=1, global_batch=16) as batches:
        assert next(batches).labels.shape == (0,)


def test_pictures_without_a_label_say_so(digits_url: str) -> None:
    with stream(digits_url, labels=True) as batches:
        assert set(next(batches).labels.tolist()) <= {NO_LABEL, *range(10)}


@pytest.mark.parametrize("world", [1, 3])
def test_mirrored_positions(digits_url: str, world: int) -> None:
    def odd(positions: np.ndarray) -> np.ndarray:
        return positions % 2 == 1

    for rank in range(world):
        plain = stream(digits_url, rank=rank, world=world)
        mirrored = stream(digits_url, rank=rank, world=world, mirror=odd)
        with plain, mirrored:
            for one, other in itertools.islice(zip(plain, mirrored, strict=True), 3):
                flip = odd(one.positions)[:, None, None, None]
                assert np.array_equal(other.images, np.where(flip, one.images[:, :, ::-1], one.images))


def test_sources_are_mixed_by_weight_for_any_ranks(digits_url: str, damageable_url: Path) -> None:
    sources = [WeightedSource(digits_url, 3.0), WeightedSource(str(damageable_url), 1.0)]

    def delivered(world: int) -> list[bytes]:
        parts = [take(sources, 12, rank=rank, world=world) for rank in range(world)]
        return [b"".join(part[number][1] for part in parts) for number in range(12)]

    whole = delivered(1)
    assert delivered(3) == whole
    with ImageStream(sources, seed=3, global_batch=1024, window_shards=3) as mixed:
        images = next(mixed).images
        size = mixed.epoch_size
    alone = []
    for number, (url, count) in enumerate(((digits_url, 768), (str(damageable_url), 256))):
        with ImageStream(url, seed=source_seed(3, number, 2), global_batch=count, window_shards=3) as one:
            alone += [image.tobytes() for image in next(one).images]
            size -= one.epoch_size
    assert sorted(image.tobytes() for image in images) == sorted(alone)
    assert size == 0


def test_a_mixture_resumes_anywhere_and_is_told_by_its_hash(digits_url: str, damageable_url: Path) -> None:
    sources = [WeightedSource(digits_url, 3.0), WeightedSource(str(damageable_url), 1.0)]
    whole = take(sources, 30)
    assert take(sources, 5, position=2500) == whole[25:]
    mixed = ImageStream(sources, seed=3, global_batch=10)
    other = ImageStream([sources[0], sources[1]._replace(weight=2.0)], seed=3, global_batch=10)
    with mixed, other, pytest.raises(UserError, match="stream state: index_sha"):
        other.load_state_dict(mixed.state_dict())


def test_the_state_of_one_stream_continues_another(digits_url: str) -> None:
    whole = take(digits_url, 12)
    with stream(digits_url) as first:
        for _ in range(5):
            next(first)
        state = json.loads(json.dumps(first.state_dict()))
        assert len(json.dumps(state)) < 1000
        ahead = next(first).images.tobytes()
        first.load_state_dict(state)  # the same stream, back again
        assert next(first).images.tobytes() == ahead == whole[5][1]
    with stream(digits_url, global_batch=50, threads=0) as other:
        other.load_state_dict(state)
        assert next(other).images.tobytes() + next(other).images.tobytes() == whole[5][1]


@pytest.mark.parametrize(
    ("options", "key"), [({"seed": 4}, "seed"), ({"split": "val"}, "split"), ({"window_shards": 2}, "window")]
)
def test_the_state_of_another_order_is_refused(digits_url: str, options: dict[str, object], key: str) -> None:
    one, other = stream(digits_url), stream(digits_url, **options)
    with one, other, pytest.raises(UserError, match=f"stream state: {key}"):
        other.load_state_dict(one.state_dict())


def test_it_is_a_stage_of_a_webdataset_pipeline(tmp_path: Path) -> None:
    url = labelled(tmp_path)
    with ImageStream(url, seed=1, global_batch=16, labels=True) as batches:
        pipeline = webdataset.DataPipeline(
            batches.samples,
            webdataset.map(lambda sample: sample | {"sum": int(sample["image"].sum())}),
            webdataset.to_tuple("__key__", "image", "cls", "sum"),
            webdataset.batched(10),
        )
        keys, images, labels, sums = next(iter(pipeline))
    assert keys == [f"{position:012d}" for position in range(10)]
    with ImageStream(url, seed=1, global_batch=10, labels=True) as batches:
        expected = next(batches)
    assert np.array_equal(np.stack(list(images)), expected.images)
    assert list(labels) == expected.labels.tolist()
    assert list(sums) == [int(image.sum()) for image in expected.images]


def test_device_batches_hold_the_same_and_their_state_is_of_what_was_delivered(digits_url: str) -> None:
    with stream(digits_url) as plain, stream(digits_url) as inner:
        on_device = DeviceStream(inner, torch.device("cpu"))
        for number, (one, other) in enumerate(zip(plain, on_device, strict=False), start=1):
            assert np.array_equal(one.images, other.images.numpy())
            assert np.array_equal(one.positions, other.positions.numpy())
            assert on_device.state_dict() == plain.state_dict()
            if number == 4:
                break


def test_it_works_in_one_thread(digits_url: str) -> None:
    assert take(digits_url, 5, threads=0) == take(digits_url, 5)


UNCLOSED = """
import sys
from data_pipeline import ImageStream
stream = ImageStream(sys.argv[1], seed=1, global_batch=64, window_shards=3, prefetch_bytes=200_000)
for _ in range(int(sys.argv[2])):
    next(stream)
"""


@pytest.mark.parametrize("batches", [1, 7])
def test_a_program_that_forgets_to_close_its_stream_ends(digits_url: str, batches: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", UNCLOSED, digits_url, str(batches)], timeout=60, capture_output=True
    )
    assert done.returncode == 0, done.stderr
