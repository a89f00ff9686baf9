import tempfile
from pathlib import Path

import pytest

from data_pipeline.build import BuildOptions, build
from data_pipeline.sources.digits import DigitsSource


@pytest.fixture(scope="session")
def digits_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digits as a data set of many small shards (read-only: tests that damage it copy it first)."""
    out = tmp_path_factory.mktemp("digits") / "shards"
    build(DigitsSource(), str(out), BuildOptions(shard_bytes=200_000))
    return str(out)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in which scratch folders are made from now on."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty folder for a collection."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


@pytest.fixture
def damageable_url(digits_url: str, tmp_path: Path) -> Path:
    """A copy of `digits_url` that a test may damage."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in Path(digits_url).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy
