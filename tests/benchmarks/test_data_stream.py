"""`python -m benchmarks.data_stream` end to end with few pictures, and its parts."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.data_build.running import Rate
from benchmarks.data_stream import speed
from benchmarks.data_stream.bars import at_least, at_most, beside_decoding_bar, small, speed_bars
from benchmarks.data_stream.command import DataStreamResult, main, read
from benchmarks.data_stream.contenders import (
    DECODE_ONLY,
    FOLDER,
    LITDATA,
    MOSAIC,
    OURS,
    STOCK,
    WITH_OUR_DECODER,
)
from benchmarks.data_stream.faults import Faults
from benchmarks.data_stream.memory import Memory, memory_bars
from benchmarks.data_stream.resume import Start, resume_bars
from benchmarks.data_stream.site import Site, site, write_pictures
from benchmarks.data_stream.speed import Speed
from benchmarks.process import Hang

PICTURES = 200


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server with few pictures in it."""
    with site(tmp_path_factory.mktemp("data-stream"), PICTURES, mosaic=None) as made:
        yield made


def rate(name: str, wall: float, cpu: float, repeats: int = 5) -> Rate:
    return Rate(name=name, pictures=1_000_000, wall=[wall] * repeats, cpu=[cpu] * repeats)


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "stream.json"
    result = main(
        ["--pictures", "150", "--folder", str(tmp_path), "--parts", "resume,memory", "--json", str(file)]
    )
    assert DataStreamResult.from_json(file.read_bytes(), file.name) == result
    content = json.loads(file.read_bytes())
    assert content["schema"] == "data-stream-benchmark/1"
    ours = [start["bytes"] for start in content["starts"] if start["contender"] == OURS]
    assert len(ours) == 3
    assert min(ours) > 64 * 5000, "a batch of pictures, at least"
    assert [one["contender"] for one in content["memory"]] == [OURS, STOCK]
    assert all(len(one["resident"]) == 20 for one in content["memory"])
    names = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("bar ")]
    assert names == [
        "small-stream-resume-spread-at-most",
        "small-stream-resume-bytes-at-most",
        "small-stream-resume-webdataset-skip",
        "small-stream-memory-drift-at-most",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["stream.json"], "all else is removed again"


def test_everyone_delivers_the_same_pictures_and_is_timed(place: Site) -> None:
    digests = {}
    for name in (DECODE_ONLY, OURS, STOCK, WITH_OUR_DECODER):
        with place.start(place.job(name, workers=1 if name == STOCK else 0)) as process:
            digests[name] = process.ask("digests")
            answer = process.ask("epoch")
            assert place.data.pictures <= answer["pictures"] < place.data.pictures + 64
            assert min(answer["wall"], answer["cpu"]) > 0
            version = process.ask("version")
            assert (version is not None) == (name in (STOCK, WITH_OUR_DECODER))
    assert len(digests[OURS]) == place.data.pictures
    assert digests[OURS] == digests[DECODE_ONLY], "the floor decodes in our order"
    assert digests[STOCK] != digests[OURS]
    for found in digests.values():
        assert sorted(found) == sorted(digests[OURS])


def test_an_epoch_of_everyone_who_needs_nothing_installed(
    place: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(place, "missing", [MOSAIC, LITDATA])
    monkeypatch.setattr(speed, "_TRIED_WORKERS", (0,))
    place.write_formats([])
    found = speed.measure_speed(place, repeats=1)
    assert list(found.rates) == [
        DECODE_ONLY,
        OURS,
        f"{OURS}, s3fs",
        f"{OURS}, local folder",
        FOLDER,
        f"{STOCK}, 0 workers",
        f"{WITH_OUR_DECODER}, 0 workers",
    ]
    assert all(len(one.wall) == len(one.cpu) == 1 for one in found.rates.values())
    assert [peer.name for peer in found.peers] == [FOLDER, STOCK, WITH_OUR_DECODER]
    assert len(found.loads) == 1
    assert f"deliver the same {place.data.pictures} pictures" in capsys.readouterr().out
    assert not any(bar.ok for bar in found.bars()), "one repeat decides nothing"


def test_a_process_that_does_not_answer_is_ended(place: Site) -> None:
    with place.start(place.job(OURS)) as process, pytest.raises(Hang, match="no answer to 'digests'"):
        process.ask("digests", seconds=0.0)


def test_a_process_that_fails_says_why(place: Site) -> None:
    job = place.job(OURS, url=f"{place.server.url}/nothing")
    with place.start(job) as process, pytest.raises(ChildProcessError, match=r"index\.json: no such file"):
        process.ask("epoch")


def test_pictures_are_unlike_each_other_and_lsun_sized(tmp_path: Path) -> None:
    write_pictures(tmp_path / "some", 30)
    files = [path.read_bytes() for path in sorted((tmp_path / "some").iterdir())]
    assert len(set(files)) == 30
    assert 8_000 < sum(map(len, files)) / 30 < 20_000
    assert {Image.open(io.BytesIO(data)).size for data in files} == {(256, 256)}


def test_speed_is_judged_by_wall_and_by_processor_time() -> None:
    bars = speed_bars("n", 1.1, rate("a", 1.0, 2.0), [rate("b", 1.2, 4.0), rate("c", 1.5, 2.1)])
    assert [bar.line() for bar in bars] == ["bar n-wall 1.200 1.1 ok", "bar n-cpu 1.050 1.1 short"]
    few = speed_bars("n", 1.1, rate("a", 1.0, 2.0, repeats=4), [rate("b", 9.0, 9.0)])
    assert [bar.ok for bar in few] == [False, False]
    assert [bar.line() for bar in speed_bars("n", 1.1, rate("a", 1.0, 1.0), [])] == [
        "bar n-wall nan 1.1 short",
        "bar n-cpu nan 1.1 short",
    ]


def test_time_beside_decoding() -> None:
    decode, ours = rate("d", 1.0, 100.0), rate("o", 1.0, 120.0)
    bar = beside_decoding_bar("n", 3.0, decode, ours, rate("t", 1.0, 180.0))
    assert bar.line() == "bar n 4.000 3 ok"
    assert "100.0 us of decoding" in bar.measured
    assert not beside_decoding_bar("n", 3.0, decode, ours, rate("t", 1.0, 180.0, repeats=4)).ok
    # No less than can be told from nothing.
    assert beside_decoding_bar("n", 3.0, decode, rate("o", 1.0, 99.0), rate("t", 1.0, 110.0)).value == 20.0


def test_bounds() -> None:
    assert at_least("n", 2.0, 2.0, "").line() == "bar n 2.000 2 ok"
    assert at_least("n", 2.0, 1.9, "").line() == "bar n 1.900 2 short"
    assert at_most("n", 2.0, 2.0, "").line() == "bar n-at-most 2.000 2 ok"
    assert at_most("n", 2.0, 2.1, "").line() == "bar n-at-most 2.100 2 short"
    assert [bar.name for bar in small([at_least("n", 1.0, 1.0, "")])] == ["small-n"]


def test_all_bars_of_speed_and_missing_peers() -> None:
    assert Speed().bars() == []
    names = (OURS, f"{OURS}, s3fs", DECODE_ONLY, f"{STOCK}, 2 workers", f"{WITH_OUR_DECODER}, 0 workers")
    rates = {name: rate(name, 1.0, 1.0) for name in names}
    bars = {bar.name: bar for bar in Speed(rates=rates).bars()}
    assert len(bars) == 9
    assert bars["stream-decode-only-cpu"].ok
    assert not bars["stream-webdataset-wall"].ok
    assert bars[f"stream-{MOSAIC}-wall"].line() == f"bar stream-{MOSAIC}-wall nan 1.2 short"


def test_bars_of_starts() -> None:
    starts = [
        Start(contender=OURS, fraction=fraction, requests=9, bytes=bytes_, each=[bytes_])
        for fraction, bytes_ in ((0.1, 1000), (0.5, 1040), (0.9, 1020))
    ]
    starts.append(Start(contender=STOCK, fraction=0.9, requests=3, bytes=102_000, each=[102_000]))
    bars = resume_bars(starts, batch_bytes=1 << 20)
    assert [bar.line().split()[1:] for bar in bars] == [
        ["stream-resume-spread-at-most", "1.040", "1.05", "ok"],
        ["stream-resume-bytes-at-most", "0.001", "34", "ok"],
        ["stream-resume-webdataset-skip", "100.000", "50", "ok"],
    ]
    assert resume_bars([], 1.0) == []


def faults(**changed: object) -> Faults:
    found: dict[str, object] = {
        "rates": {"clean": rate("clean", 1.0, 1.0), "10 % faulty": rate("10 % faulty", 1.25, 1.0)},
        "bytes": {"clean": [100, 100], "10 % faulty": [110, 120]},
        "injected": {"flip": 3},
        "same_order": True,
        "flips_wanted": 1000,
        "flips": 1200,
        "flips_requests": 70_000,
        "stops": 1,
        "damaged": 0,
        "hangs": 0,
        "loads": [],
    }
    return Faults.model_validate(found | changed)


def test_bars_of_faults() -> None:
    assert [bar.line() for bar in faults().bars()] == [
        "bar stream-faults-throughput-wall 0.800 0.7 ok",
        "bar stream-faults-throughput-cpu 1.000 0.7 ok",
        "bar stream-faults-same-order 1.000 1 ok",
        "bar stream-faults-bytes-at-most 1.150 1.3 ok",
        "bar stream-faults-damaged-at-most 0.000 0 ok",
        "bar stream-faults-flips 1200.000 1000 ok",
        "bar stream-faults-hangs-at-most 0.000 0 ok",
    ]
    assert not {bar.name: bar.ok for bar in faults(damaged=1).bars()}["stream-faults-damaged-at-most"]
    assert "stream-faults-flips" not in [bar.name for bar in faults(flips_wanted=0, flips=5).bars()]
    hung = faults(hangs=1, rates={})
    assert [bar.line() for bar in hung.bars()] == ["bar stream-faults-hangs-at-most 1.000 0 short"]


def test_drift_of_memory() -> None:
    ours = Memory(contender=OURS, resident=[50, 100, *[140] * 17, 102])
    theirs = Memory(contender=STOCK, resident=[100, 100, *[100] * 17, 200])
    (bar,) = memory_bars([ours, theirs])
    assert bar.line() == "bar stream-memory-drift-at-most 0.020 0.03 ok"
    assert "webdataset 100.00 %" in bar.measured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pictures", "0"], "every N must be at least 1"),
        (["--folder", "/no/such"], "/no/such: no such folder"),
        (["--mosaic", "/no/such"], "/no/such: no such folder"),
        (["--parts", "speed,nonsense"], "nonsense unknown; there are speed, resume, faults, memory"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
