from pathlib import Path

import numpy as np
import pytest
import torch
from cleanfid.resize import build_resizer

from data_pipeline.documents import sha256_hex
from data_pipeline.errors import UserError
from eval.features import (
    EFFNETLITE0,
    INCEPTION,
    FeatureChoice,
    NetworkKind,
    ResizeMode,
    open_network,
    parse_choice,
)
from eval.features.resize import resize_clean
from tests.eval.helpers import RandomInception

CPU = torch.device("cpu")
HASH = "ab" * 32


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
        ("vgg", "unknown network 'vgg'; use effnetlite0, inception=PATH_OR_URL, inception-state=PATH_OR_URL"),
        ("effnetlite0=/some/file", "unknown network"),
        ("inception", "never downloaded silently"),
        ("inception=", "never downloaded silently"),
        ("inception=/file#sha256=12", "64 hexadecimal"),
        ("inception-state", "never downloaded silently; .*95628359 bytes, sha256 6726825d"),
        ("torchscript", r"write torchscript=PATH_OR_URL#sha256=HEX&dim=D"),
        ("torchscript=/file", r"write torchscript=PATH_OR_URL#sha256=HEX&dim=D"),
        (f"torchscript=/file#sha256={HASH}", "needs its file, its hash and its number of features"),
        ("torchscript=/file#sha256=12&dim=4", "64 hexadecimal"),
        (f"torchscript=/file#sha256={HASH}&dim=four", "dim=four is not a whole number of at least 1"),
        (f"torchscript=/file#sha256={HASH}&dim=0", "dim=0 is not a whole number of at least 1"),
        (f"torchscript=/file#sha256={HASH}&dim=4&size=9", "has no option size; known: dim, classes, side"),
        (f"torchscript=/file#sha256={HASH}&dim=4&mean=1,2,3", "give mean and std together"),
        (f"torchscript=/file#sha256={HASH}&dim=4&mean=0,0,0&std=1,0,1", "std above 0"),
        (f"torchscript=/file#sha256={HASH}&dim=4&mean=1,2&std=1,1,1", "mean=1,2 is not three numbers"),
        (f"torchscript=/file#sha256={HASH}&dim=4&name=inception", "name=inception: use 1 to 32 letters"),
        (f"python=/file.py#sha256={HASH}&dim=4", "python wants FILE.py:FUNCTION"),
        (f"python=/file.so:network#sha256={HASH}&dim=4", "python wants FILE.py:FUNCTION"),
        ("python", "write python=FILE.py:FUNCTION#sha256=HEX&dim=D"),
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


class Counting(RandomInception):
    """Counts the passes through its layers where tests can see it: in the file's own buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(
        self,
        img: torch.Tensor,
        return_features: bool = False,
        use_fp16: bool = False,
        no_output_bias: bool = False,
    ) -> torch.Tensor:
        self.passes += 1
        features = self.layers((img - 128) / 128)
        if return_features:
            return features
        return (features @ self.output.weight.t() + 0.0 * self.output.bias).softmax(dim=1)


@pytest.mark.parametrize("mode", [ResizeMode.CLEAN, ResizeMode.LEGACY_TENSORFLOW])
@pytest.mark.parametrize("hidden", [False, True])
def test_one_pass_gives_what_two_calls_give(mode: ResizeMode, hidden: bool, tmp_path: Path) -> None:
    torch.manual_seed(2)
    module = Counting().eval()
    if hidden:  # two tensors of the shape of the output layer's weight: no way to tell which it is
        module.register_buffer("other", torch.zeros(1008, 2048))
    path = tmp_path / "inception.pt"
    torch.jit.script(module).save(str(path))
    network = open_network(
        parse_choice(f"inception={path}#sha256={sha256_hex(path.read_bytes())}", mode), CPU
    )
    images = pictures(3)
    before = float(network._network.passes)
    found = network(images)
    assert found.probabilities is not None
    passes = float(network._network.passes) - before
    assert passes == (mode is ResizeMode.LEGACY_TENSORFLOW) + hidden
    native = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    x = resize_clean(images, 299) if mode is ResizeMode.CLEAN else native
    with torch.no_grad():
        torch.testing.assert_close(found.pooled, module(x, return_features=True))
        torch.testing.assert_close(found.probabilities, module(x, no_output_bias=True))


@pytest.mark.parametrize(
    ("text", "mode", "remedy"),
    [
        (
            "effnetlite0",
            "legacy_tensorflow",
            "only clean; .* goes with inception or inception-state",
        ),
        ("effnetlite0", "legacy_pytorch", "only clean; resize=legacy_pytorch goes with inception-state"),
        (
            "inception=/f",
            "legacy_pytorch",
            "only clean and legacy_tensorflow; .* inception-state",
        ),
        (f"torchscript=/f#sha256={HASH}&dim=4", "legacy_tensorflow", "only clean; "),
        (f"python=/f.py:net#sha256={HASH}&dim=4", "legacy_pytorch", "only clean; "),
    ],
)
def test_modes_that_a_network_does_not_have(text: str, mode: str, remedy: str) -> None:
    with pytest.raises(UserError, match=f"has no resize={mode}, {remedy}") as refused:
        parse_choice(text, ResizeMode(mode))
    assert "\n" not in str(refused.value)


class Small(torch.nn.Module):
    """Mean of each quarter of the picture in each colour, and what a softmax makes of the first four."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled = torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return pooled, pooled[:, :4].softmax(dim=1)


def test_any_torchscript(tmp_path: Path) -> None:
    path = tmp_path / "dino.pt"
    torch.jit.script(Small()).save(str(path))
    sha256 = sha256_hex(path.read_bytes())
    choice = parse_choice(
        f"torchscript={path}#sha256={sha256}&dim=12&classes=4&side=28&mean=0.5,0.4,0.3&std=0.2,0.2,0.1&name=dino"
    )
    assert choice.identity.distance_name == f"FD-dino-{sha256[:8]}"
    assert choice.identity.resize == "clean-fid/PIL-bicubic-float32/28/mean=0.5,0.4,0.3/std=0.2,0.2,0.1"
    images = pictures(3)
    found = open_network(choice, CPU)(images)
    mean, std = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.2, 0.1])[:, None, None]
    pooled, probabilities = Small()((resize_clean(images, 28) / 255 - mean) / std)
    torch.testing.assert_close(found.pooled, pooled)
    torch.testing.assert_close(found.probabilities, probabilities)
    wrong = parse_choice(f"torchscript={path}#sha256={sha256}&dim=11&classes=4")
    with pytest.raises(UserError, match=r"features \[3, 12\] and 4 classes, declared are \[3, 11\] and 4"):
        open_network(wrong, CPU)(images)


def test_any_python_function(tmp_path: Path) -> None:
    path = tmp_path / "network.py"
    path.write_text("def make(device):\n    return lambda x: x.mean(dim=(2, 3)).to(device)\nother = 3\n")
    sha256 = sha256_hex(path.read_bytes())
    choice = parse_choice(f"python={path}:make#sha256={sha256}&dim=3")
    assert (choice.kind, choice.identity.classes) == (NetworkKind.PYTHON, 0)
    assert choice.identity.distance_name == f"FD-python-{sha256[:8]}"
    images = pictures(3)
    found = open_network(choice, CPU)(images)
    torch.testing.assert_close(found.pooled, resize_clean(images, 224).mean(dim=(2, 3)))
    assert found.probabilities is None
    assert found.spatial is None
    for name in ("absent", "other"):
        with pytest.raises(UserError, match=f"has no function {name}"):
            open_network(parse_choice(f"python={path}:{name}#sha256={sha256}&dim=3"), CPU)


def test_files_of_other_networks_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "network.py"
    path.write_text("raise SystemExit('ran')\n")
    with pytest.raises(UserError, match=f"with sha256 {sha256_hex(path.read_bytes())}, expected {HASH}"):
        open_network(parse_choice(f"python={path}:make#sha256={HASH}&dim=3"), CPU)
    with pytest.raises(UserError, match="cannot read weights"):
        open_network(parse_choice(f"torchscript=/nowhere.pt#sha256={HASH}&dim=3"), CPU)
    path.write_text("def (:\n")
    sha256 = sha256_hex(path.read_bytes())
    with pytest.raises(UserError, match="no Python"):
        open_network(parse_choice(f"python={path}:make#sha256={sha256}&dim=3"), CPU)
    with pytest.raises(UserError, match="no TorchScript"):
        open_network(parse_choice(f"torchscript={path}#sha256={sha256}&dim=3"), CPU)
