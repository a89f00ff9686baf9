"""A small data set of real digits, and an Inception of the right interface with random weights."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from data_pipeline.build import BuildOptions, build
from data_pipeline.documents import sha256_hex
from data_pipeline.sources.folder import FolderSource
from eval.features import FeatureChoice, parse_choice
from eval.service import Service, WatchOptions
from eval.team import Team
from tests.eval.helpers import RandomInception, start_run
from trainer.run import Run


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """As torchrun sets it: the thread count is part of what fixes every rounding."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """40 real digits of 8 x 8 in grey: training and validation pictures."""
    folder = tmp_path_factory.mktemp("digits")
    for number, picture in enumerate(load_digits().images[:40]):
        Image.fromarray((picture * 15.9375).astype("uint8")).save(folder / f"{number:03d}.png")
    out = tmp_path_factory.mktemp("shards") / "data"
    build(FolderSource(folder), str(out), BuildOptions(size=8, channels=1, val_fraction=0.3))
    return str(out)


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "inception.pt"
    torch.jit.script(RandomInception().eval()).save(str(path))
    return path


@pytest.fixture(scope="session")
def inception_option(inception_file: Path) -> str:
    return f"inception={inception_file}#sha256={sha256_hex(inception_file.read_bytes())}"


SMALL_NETWORK = """
import torch

def network(device):
    torch.manual_seed(0)
    weight = torch.randn(12, 192, device=device) / 2000

    def features(x):
        pooled = x.flatten(1) @ weight.T
        return pooled, pooled[:, :3].softmax(1)

    return features
"""


@pytest.fixture(scope="session")
def small_network_option(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A feature network of 12 features and 3 classes in a Python file."""
    path = tmp_path_factory.mktemp("network") / "small.py"
    path.write_text(SMALL_NETWORK)
    return f"python={path}:network#sha256={sha256_hex(path.read_bytes())}&dim=12&classes=3&side=8&name=small"


@pytest.fixture
def inception(inception_option: str) -> FeatureChoice:
    return parse_choice(inception_option)


@pytest.fixture
def team() -> Iterator[Team]:
    with Team() as alone:
        yield alone


@pytest.fixture(scope="session")
def prepared_run(tmp_path_factory: pytest.TempPathFactory, data_url: str, inception_option: str) -> Run:
    """A finished run of two checkpoints, its reference statistics stored; tests use copies."""
    made = start_run(tmp_path_factory.mktemp("prepared") / "run", data_url)
    with Team() as alone:
        assert Service(made.url, WatchOptions(features=inception_option), alone).set_up()
    return made


@pytest.fixture
def run(tmp_path: Path, prepared_run: Run) -> Run:
    """A copy of `prepared_run` that a test may change."""
    shutil.copytree(prepared_run.url, tmp_path / "run")
    return Run(str(tmp_path / "run"))
