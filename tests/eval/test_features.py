from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer

from data_pipeline.documents import sha256_hex
from data_pipeline.errors import UserError
from eval.features import EFFNETLITE0, INCEPTION, FeatureChoice, open_network, parse_choice
from tests.eval.helpers import RandomInception

CPU = torch.device("cpu")


def pictures(channels: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 8, 8, channels), dtype=np.uint8)


def test_inception_sees_what_clean_fid_shows_it(inception: FeatureChoice, inception_file: Path) -> None:
    network = open_network(inception, CPU)
    images = pictures(3)
    found = network(images)
    resize = build_resizer("clean")
    x = torch.from_numpy(np.stack([resize(image) for image in images])).permute(0, 3, 1, 2)
    module = torch.jit.load(str(inception_file))
    with torch.no_grad():
        torch.testing.assert_close(found.pooled, module(x, return_features=True))
        torch.testing.assert_close(found.probabilities, module(x, no_output_bias=True))
        assert not torch.allclose(found.probabilities, module(x))


def test_grey_is_repeated_to_rgb(inception: FeatureChoice) -> None:
    network = open_network(inception, CPU)
    grey = pictures(1)
    assert torch.equal(network(grey).pooled, network(grey.repeat(3, axis=3)).pooled)


def test_only_the_original_weights_earn_the_names_fid_and_is(inception: FeatureChoice) -> None:
    assert (INCEPTION.distance_name, INCEPTION.score_name) == ("FID", "IS")
    assert (EFFNETLITE0.distance_name, EFFNETLITE0.score_name) == ("FD-effnetlite0", "CS-effnetlite0")
    assert inception.identity.distance_name == f"FD-inception-{inception.identity.sha256[:8]}"


def test_weights_by_url(inception_file: Path) -> None:
    sha256 = sha256_hex(inception_file.read_bytes())
    choice = parse_choice(f"inception=file://{inception_file}#sha256={sha256.upper()}")
    assert open_network(choice, CPU).identity.sha256 == sha256


def test_another_file_needs_its_hash(inception_file: Path) -> None:
    with pytest.raises(UserError) as refused:
        open_network(parse_choice(f"inception={inception_file}"), CPU)
    line = str(refused.value)
    assert sha256_hex(inception_file.read_bytes()) in line
    for fact in (
        str(inception_file),
        INCEPTION.sha256,
        "https://nvlabs-fi-cdn.nvidia.com/",
        "95607719 bytes",
    ):
        assert fact in line
    assert "\n" not in line


@pytest.mark.parametrize("place", ["/nowhere/inception.pt", "file:///nowhere/inception.pt", "bogus://x/y"])
def test_missing_weights(place: str) -> None:
    with pytest.raises(UserError, match=r"cannot read Inception weights .* 95607719 bytes, sha256 f58cb9b6"):
        open_network(parse_choice(f"inception={place}"), CPU)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vgg", "unknown network 'vgg'"),
        ("effnetlite0=/some/file", "unknown network"),
        ("inception", "never downloaded silently"),
        ("inception=", "never downloaded silently"),
        ("inception=/file#sha256=12", "64 hexadecimal"),
    ],
)
def test_bad_choices(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_choice(text)


def test_not_an_inception(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    for data in (path.read_bytes(), b"no TorchScript at all"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="no TorchScript Inception with `layers`"):
            open_network(parse_choice(f"inception={path}#sha256={sha256_hex(data)}"), CPU)


def test_wrong_sizes(tmp_path: Path) -> None:
    module = RandomInception()
    module.output = torch.nn.Linear(2048, 10)
    path = tmp_path / "small.pt"
    torch.jit.script(module.eval()).save(str(path))
    network = open_network(parse_choice(f"inception={path}#sha256={sha256_hex(path.read_bytes())}"), CPU)
    with pytest.raises(UserError, match="2048 features and 10 classes, expected 2048 and 1008"):
        network(pictures(3))
