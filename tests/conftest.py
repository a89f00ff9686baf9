"""Fixtures of the whole suite: one real S3 server, started by the first test that wants it."""

import itertools
import os
from collections.abc import Iterator

# Two OpenMP threads per process spin on each other's time slices when several processes share two cores: a
# hundred times slower. Set before torch is imported, and inherited by every program the tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from launch.s3server import S3Server

_numbers = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def _references(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Statistics of real pictures go into a cache of these tests; programs they start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_REFERENCES", str(tmp_path_factory.mktemp("references")))
        yield


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running SeaweedFS; from now on the process's environment (AWS_*) points at it."""
    with (
        S3Server(tmp_path_factory.mktemp("s3server"), bucket="tests") as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in server.env().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(scope="session")
def s3_url(s3_server: S3Server) -> str:
    """URL of a bucket that is there and can be written."""
    return s3_server.url


@pytest.fixture
def s3_prefix(s3_url: str) -> str:
    """URL of a fresh, empty prefix for one test."""
    return f"{s3_url}/test-{next(_numbers):04d}"
