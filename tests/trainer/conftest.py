"""Fixtures of the trainer's tests."""

import pytest

from data_pipeline.build import build
from data_pipeline.sources.digits import DigitsSource


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digits as shards on disk; read, never written."""
    url = str(tmp_path_factory.mktemp("shards"))
    build(DigitsSource(), url)
    return url
