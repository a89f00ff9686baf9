import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import UserError
from eval.features import Features
from eval.reference import RealJob, real_statistics
from eval.reference_cache import ReferenceCache
from eval.team import Team
from tests.eval.test_statistics import IDENTITY, Pixels

GREY = IDENTITY.model_copy(update={"dim": 64})


class Counting(Pixels):
    """Pixels of grey 8 x 8 pictures; counts its calls."""

    def __init__(self) -> None:
        super().__init__(identity=GREY)


@pytest.fixture
def cache(tmp_path: Path) -> ReferenceCache:
    return ReferenceCache(str(tmp_path / "cache"))


def test_what_was_computed_once_is_read(cache: ReferenceCache, data_url: str, team: Team) -> None:
    network, wanted = Counting(), RealJob(data_url, "train", spatial=True, store=True)
    computed = real_statistics(team, network, wanted, cache)
    calls = len(network.calls)
    read = real_statistics(team, network, wanted, cache)
    assert len(network.calls) == calls > 0
    assert torch.equal(read.moments.scatter, computed.moments.scatter)
    assert read.moments.count == computed.moments.count
    assert read.spatial is not None
    assert computed.spatial is not None
    assert torch.equal(read.spatial.scatter, computed.spatial.scatter)
    assert read.features is not None
    assert computed.features is not None
    np.testing.assert_array_equal(read.features, computed.features)
    assert (read.score, read.constant) == (computed.score, computed.constant)


def test_another_question_is_computed(
    cache: ReferenceCache, data_url: str, team: Team, tmp_path: Path
) -> None:
    network = Counting()
    wanted = [
        RealJob(data_url, "train"),
        RealJob(data_url, "val"),
        RealJob(data_url, "train", limit=9),
        RealJob(data_url, "train", splits=2),
        RealJob(data_url, "train", store=True),
    ]
    for count, job in enumerate(wanted, start=1):
        real_statistics(team, network, job, cache)
        assert len(list((tmp_path / "cache").iterdir())) == count


def test_more_than_asked_for_serves_too(cache: ReferenceCache, data_url: str, team: Team) -> None:
    more = real_statistics(team, Counting(), RealJob(data_url, "train", spatial=True, store=True), cache)
    network = Counting()
    less = real_statistics(team, network, RealJob(data_url, "train"), cache)
    assert not network.calls
    assert torch.equal(less.moments.scatter, more.moments.scatter)
    assert less.features is None


def test_place_that_cannot_be_written_costs_no_result(
    data_url: str, team: Team, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = ReferenceCache(str(tmp_path / "file" / "cache"))
    assert real_statistics(team, Counting(), RealJob(data_url, "train"), cache).moments.count > 20
    assert "set DDPM_REFERENCES" in caplog.text


def test_damage_is_found(cache: ReferenceCache, data_url: str, team: Team, tmp_path: Path) -> None:
    wanted = RealJob(data_url, "train", store=True)
    real_statistics(team, Counting(), wanted, cache)
    moments = next((tmp_path / "cache").glob("*/*-moments.safetensors"))
    features = next((tmp_path / "cache").glob("*/*-features.f32"))
    good = features.read_bytes()
    features.write_bytes(good[:-4])
    with pytest.raises(UserError, match=r"features\.f32: damaged; delete its folder"):
        real_statistics(team, Counting(), wanted, cache)
    features.unlink()
    with pytest.raises(UserError, match=r"features\.f32: damaged; delete its folder"):
        real_statistics(team, Counting(), wanted, cache)
    features.write_bytes(good)
    data = bytearray(moments.read_bytes())
    data[-1] ^= 1
    moments.write_bytes(data)
    with pytest.raises(UserError, match=r"moments\.safetensors: damaged; delete its folder"):
        real_statistics(team, Counting(), wanted, cache)


def test_unfinished_entry_counts_as_absent(
    cache: ReferenceCache, data_url: str, team: Team, tmp_path: Path
) -> None:
    wanted = RealJob(data_url, "train")
    first = real_statistics(team, Counting(), wanted, cache)
    next((tmp_path / "cache").glob("*/facts.json")).unlink()
    network = Counting()
    again = real_statistics(team, network, wanted, cache)
    assert network.calls
    assert torch.equal(again.moments.scatter, first.moments.scatter)


def test_a_race_leaves_the_first_ones_facts(data_url: str, team: Team, tmp_path: Path) -> None:
    """Two processes compute the same: the second one's files do not disturb the first one's."""

    class Other(Counting):
        def __call__(self, images: np.ndarray) -> Features:
            features = super().__call__(images)
            return Features(features.pooled + 1, features.probabilities, features.spatial)

    wanted = RealJob(data_url, "train", store=True)
    for name, network in (("a", Counting()), ("b", Other())):
        real_statistics(team, network, wanted, ReferenceCache(str(tmp_path / name)))
    (entry,) = (tmp_path / "b").iterdir()
    facts = (tmp_path / "a" / entry.name / "facts.json").read_bytes()
    shutil.copytree(entry, tmp_path / "a" / entry.name, dirs_exist_ok=True)
    (tmp_path / "a" / entry.name / "facts.json").write_bytes(facts)
    cache = ReferenceCache(str(tmp_path / "a"))
    assert real_statistics(team, Counting(), wanted, cache).moments.mean.max() <= 1


def test_two_pictures_at_least(data_url: str, team: Team) -> None:
    with pytest.raises(UserError, match=r"split 'train' has 1 picture\(s\), statistics need two"):
        real_statistics(team, Counting(), RealJob(data_url, "train", limit=1))
