"""`python -m benchmarks.evaluation` end to end with small networks, and its parts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.evaluation import distances
from benchmarks.evaluation.clock import NetworkClock
from benchmarks.evaluation.command import PARTS, EvaluationResult, main, read
from benchmarks.evaluation.contenders import OUR_CONFIGURATION, contenders, our_distance
from benchmarks.evaluation.distances import Distances, DistanceTimes
from benchmarks.evaluation.extraction import Answer, Extraction, FeatureTimes, check
from benchmarks.evaluation.job import Configuration
from benchmarks.evaluation.memory import Memory, memory_bars
from benchmarks.evaluation.overlap import OVERRIDES, Overlap, OverlapTimes, check_same
from benchmarks.evaluation.pictures import SIZE, PictureSet
from benchmarks.harness import OURS
from benchmarks.peers.clean_fid import CLEAN_FID
from benchmarks.peers.distribution import LibraryPeer
from benchmarks.peers.torch_fidelity import TORCH_FIDELITY
from eval.moments import moments_of
from eval.statistics import Statistics
from tests.support import tiny_recipe

SQRTM = "clean-fid, scipy.linalg.sqrtm"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.slow  # a minute
def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "evaluation.json"
    where = ["--folder", str(tmp_path), "--json", str(file)]
    result = main(["--small", "--repeats", "1", "--threads", "1", *where])
    assert EvaluationResult.from_json(file.read_bytes(), file.name) == result
    content = json.loads(file.read_bytes())
    assert content["schema"] == "evaluation-benchmark/1"
    assert content["missing"] == []
    assert len(content["trials"]) == 4, "two ways of each peer"
    agreements = content["agreements"]
    assert {each["contender"].partition(",")[0] for each in agreements} == {"clean-fid", "torch-fidelity"}
    assert all(each["features"] < 1e-4 < each["scale"] for each in agreements)
    times = content["features"]
    assert times[0]["name"] == OURS
    assert len(times) == 5, "each peer without worker processes, and with some"
    for each in times:
        assert len(each["wall"]) == len(each["cpu"]) == len(each["network"]) == len(each["resize"]) == 1
        assert all(0 < inside < wall for inside, wall in zip(each["network"], each["wall"], strict=True))
        assert min(each["resize"]) > 0 or not each["in_process"]
    assert [each["name"].partition(",")[0] for each in content["distances"]] == [
        OURS,
        "clean-fid",
        "torch-fidelity",
    ]
    assert [(each["pictures"], each["kept"]) for each in content["memory"]] == [(64, True), (128, True)]
    assert [(each["overlap"], each["threads"]) for each in content["overlap"]] == [(True, 1), (False, 1)]
    lines = capsys.readouterr().out.splitlines()
    assert sum("the machine was" in line for line in lines) == 3
    assert [line.split()[1:2] + line.split()[3:4] for line in lines[-7:]] == [
        ["small-evaluation-features-clean-fid", "1.05"],
        ["small-evaluation-rest-clean-fid", "3"],
        ["small-evaluation-features-torch-fidelity", "1"],
        ["small-evaluation-rest-torch-fidelity", "3"],
        ["small-evaluation-frechet-64-sqrtm", "4"],
        ["small-evaluation-memory-features-kept-at-most", "1.1"],
        ["small-evaluation-overlap-1-thread", "0.97"],
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"], "all else is removed again"


def test_missing_peers_are_short(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(LibraryPeer, "version", None)
    result = main(["--small", "--repeats", "5", "--threads", "1", "--parts", "features,frechet"])
    assert result.missing == ["clean-fid", "torch-fidelity"]
    assert [each.name for each in result.features] == [OURS]
    output = capsys.readouterr().out
    assert "clean-fid is not installed: its bars are short" in output
    assert output.splitlines()[-5:] == [
        "bar small-evaluation-features-clean-fid nan 1.05 short",
        "bar small-evaluation-rest-clean-fid nan 3 short",
        "bar small-evaluation-features-torch-fidelity nan 1 short",
        "bar small-evaluation-rest-torch-fidelity nan 3 short",
        "bar small-evaluation-frechet-64-sqrtm nan 4 short",
    ]


def test_all_have_the_same_network_and_it_is_on_the_clock(tmp_path: Path) -> None:
    pictures = PictureSet.write(tmp_path / "pictures", 2)
    assert pictures.images.shape == (2, SIZE, SIZE, 3)
    with NetworkClock() as clock:
        names = (OURS, CLEAN_FID.name, TORCH_FIDELITY.name)
        found = {}
        for contender in [each for name in names for each in contenders(clock, name, few=True)]:
            clock.restart()
            how = contender.configuration
            found[how.name] = contender.features(pictures)
            assert clock.on_network.seconds > 0, f"{how.name}: the network"
            assert clock.on_resize.seconds > 0 or not how.in_process, f"{how.name}: the resize"
    assert len(found) == 5
    for name, features in found.items():
        assert features.shape == (2, 1280)
        np.testing.assert_allclose(features, found[OURS], atol=1e-4, err_msg=name)
    clock.restart()
    clock.ours(pictures.images)
    assert clock.on_network.seconds == clock.on_resize.seconds == 0, "afterwards all is as it was"


def test_only_our_process_is_set_up_as_our_evaluation_is(monkeypatch: pytest.MonkeyPatch) -> None:
    teams: list[str] = []  # a team sets the allocator of its process
    monkeypatch.setattr("benchmarks.evaluation.contenders.Team", lambda: teams.append("ours"))
    with NetworkClock(small=True) as clock:
        assert contenders(clock, CLEAN_FID.name, few=False)
        assert contenders(clock, TORCH_FIDELITY.name, few=False)
        assert teams == []
        contenders(clock, OURS, few=False)
    assert teams == ["ours"]


def test_another_answer_is_refused() -> None:
    features = np.random.default_rng(0).random((2, 8, 4), dtype=np.float32)
    distance = our_distance(*features)
    ours = Answer(OUR_CONFIGURATION, features, distance)
    somebody = Configuration(contender="clean-fid", name="clean-fid, somehow", workers=False, in_process=True)
    agreed = Answer(somebody, features + np.float32(1e-5), distance * (1 + 1e-6))
    assert [each.contender for each in check(ours, [agreed])] == ["clean-fid, somehow"]
    brighter = features + np.float32([[[0.0]], [[1e-3]]])
    for other in (replace(agreed, features=brighter), replace(agreed, distance=1.001 * distance)):
        with pytest.raises(ValueError, match="nothing was timed"):
            check(ours, [other])


def test_another_distance_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances.torch_fidelity, "distance", lambda first, second: 1.0)
    with pytest.raises(ValueError, match=r"numpy.linalg.eigvals: distance 1.0, ours .*; nothing was timed"):
        distances.measure_distances(16, 1)


def test_other_results_of_overlapping_are_refused() -> None:
    moments = moments_of(torch.arange(6.0).reshape(3, 2))
    first = np.zeros((1, 2, 2, 3), dtype=np.uint8)
    one = Statistics(moments, None, None, None, first, 0, 0)
    check_same(one, replace(one))
    off = replace(moments, mean=moments.mean + 1e-15)
    for other in (replace(one, moments=off), replace(one, first=first + np.uint8(1))):
        with pytest.raises(ValueError, match="give different results"):
            check_same(one, other)


def test_what_is_sampled_from_is_a_network_of_its_own() -> None:
    recipe = tiny_recipe(OVERRIDES)
    assert (recipe.image.size, recipe.image.channels) == (32, 3)
    assert recipe.unet_config().widths == (32, 64)


def times(name: str, wall: float, rest: float, *, in_process: bool = True, repeats: int = 5) -> FeatureTimes:
    return FeatureTimes(
        wall=[wall] * repeats,
        cpu=[2 * wall] * repeats,
        name=name,
        pictures=100,
        network=[wall - rest - 1.0] * repeats,
        resize=[1.0] * repeats,
        in_process=in_process,
    )


def test_bars_of_features() -> None:
    found = Extraction(
        times=[
            times(OURS, 10.0, 0.1),
            times("clean-fid, folder", 11.0, 0.5, in_process=False),
            times("clean-fid, generator", 12.0, 0.4),
            times("torch-fidelity, extractor resizes", 9.9, 0.2),
        ]
    )
    assert [bar.line() for bar in found.bars()] == [
        "bar evaluation-features-clean-fid 1.100 1.05 ok",
        "bar evaluation-rest-clean-fid 4.000 3 ok",
        "bar evaluation-features-torch-fidelity 0.990 1 short",
        "bar evaluation-rest-torch-fidelity 2.000 3 short",
    ]
    assert found.times[1].row()[-2:] == ("elsewhere", "-")
    assert found.times[2].row()[-2:] == ("1.000", "400.0")
    assert Extraction().bars() == []


def test_bars_of_distances_and_overlap() -> None:
    def distance(name: str, wall: float) -> DistanceTimes:
        return DistanceTimes(wall=[wall] * 5, cpu=[wall] * 5, name=name, dim=2048, distance=1.0)

    both = Distances(times=[distance(OURS, 2.0), distance(SQRTM, 9.0)])
    assert [bar.line() for bar in both.bars()] == ["bar evaluation-frechet-2048-sqrtm 4.500 4 ok"]

    def way(overlap: bool, threads: int, wall: float) -> OverlapTimes:
        spent = {"sampling": 1.0, "features": 1.0}
        return OverlapTimes(wall=[wall] * 5, cpu=[wall] * 5, overlap=overlap, threads=threads, **spent)

    found = Overlap(times=[way(True, 2, 2.0), way(False, 2, 1.9), way(True, 1, 1.0), way(False, 1, 1.5)])
    assert [bar.line() for bar in found.bars()] == [
        "bar evaluation-overlap-2-threads 0.950 0.97 short",
        "bar evaluation-overlap-1-thread 1.500 0.97 ok",
    ]
    assert Distances().bars() == Overlap().bars() == []


def test_bars_of_memory() -> None:
    def memory(pictures: int, growth: int, *, kept: bool) -> Memory:
        return Memory(pictures=pictures, kept=kept, before=10**9, peak=10**9 + growth)

    found = [
        memory(1000, 10**8, kept=False),
        memory(10_000, 105 * 10**6, kept=False),
        memory(1000, 10**8, kept=True),
        memory(10_000, 2 * 10**8, kept=True),
    ]
    assert [bar.line() for bar in memory_bars(found)] == [
        "bar evaluation-memory-at-most 1.050 1.1 ok",
        "bar evaluation-memory-features-kept-at-most 2.000 1.1 short",
    ]
    assert memory(1, -5, kept=False).growth == 4096, "a ratio of nothing would say nothing"


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert read([]).parts == PARTS
    assert (read([]).pictures, read(["--small"]).pictures) == (512, 16)
    for arguments, message in (
        (["--repeats", "0"], "every N must be at least 1"),
        (["--pictures", "1"], "--pictures must be at least 2"),
        (["--parts", "features,speed"], "--parts: speed unknown"),
        (["--folder", "/no/such"], "/no/such: no such folder"),
    ):
        with pytest.raises(SystemExit) as caught:
            read(arguments)
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
