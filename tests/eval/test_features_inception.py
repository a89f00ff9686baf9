"""The state-dict Inception and clean-fid's modes, against clean-fid, pytorch-fid and torch-fidelity."""

from pathlib import Path

import cleanfid.features
import cleanfid.fid
import cleanfid.inception_pytorch
import numpy as np
import pytest
import safetensors.torch
import torch
from cleanfid.inception_torchscript import InceptionV3W
from PIL import Image
from pytorch_fid.fid_score import calculate_frechet_distance
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from data_pipeline.documents import sha256_hex
from data_pipeline.errors import UserError
from eval.features import (
    STATE_FILE,
    STATE_INCEPTION,
    Features,
    ResizeMode,
    open_network,
    parse_choice,
)
from eval.features.inception_state import build
from eval.metrics.frechet import frechet_distance
from eval.moments import moments_of
from tests.eval.helpers import RandomInception, random_inception_state

CPU = torch.device("cpu")
FEW = 3


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_inception_state(3)


@pytest.fixture(scope="module")
def state_file(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def option(state_file: Path) -> str:
    return f"inception-state={state_file}#sha256={sha256_hex(state_file.read_bytes())}"


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Two sets of crops of photographs: each FEW of 40 x 32."""
    crops = [
        load_sample_image(name)[60 * i : 60 * i + 40, 90 * i : 90 * i + 32]
        for name in ("china.jpg", "flower.jpg")
        for i in range(FEW)
    ]
    return np.stack(crops)


@pytest.fixture(scope="module")
def projection(found: dict[ResizeMode, Features]) -> Tensor:
    """[2048, 2] float64: two sums of features along the sets' difference.

    With few pictures the covariance of 2048 features is singular, and clean-fid's root of it is inexact
    and takes ten seconds; a single feature shows the rounding of the network, which a sum averages.
    """
    pooled = found[ResizeMode.CLEAN].pooled
    difference = (pooled[:FEW].mean(dim=0) - pooled[FEW:].mean(dim=0)).double()
    return torch.block_diag(*difference[:, None].chunk(2)) / difference.norm()


@pytest.fixture(scope="module")
def found(option: str, images: np.ndarray) -> dict[ResizeMode, Features]:
    return {mode: open_network(parse_choice(option, mode), CPU)(images) for mode in ResizeMode}


def folders(images: np.ndarray, place: Path) -> tuple[str, str]:
    half = len(images) // 2
    for number, image in enumerate(images):
        folder = place / ("a" if number < half else "b")
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return str(place / "a"), str(place / "b")


def distance(pooled: Tensor) -> float:
    half = len(pooled) // 2
    return frechet_distance(moments_of(pooled[:half]), moments_of(pooled[half:]))


def test_legacy_pytorch_is_clean_fid(
    state: dict[str, Tensor],
    images: np.ndarray,
    found: dict[ResizeMode, Features],
    projection: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Their builder, with our weights in place of those it would download.
    monkeypatch.setattr(cleanfid.inception_pytorch, "load_state_dict_from_url", lambda *_, **__: state)
    extract = cleanfid.features.feature_extractor("pytorch_inception", CPU, use_dataparallel=False)
    theirs = cleanfid.fid.compute_fid(
        *folders(images, tmp_path),
        mode="legacy_pytorch",
        custom_feat_extractor=lambda x: extract(x).double() @ projection,
        num_workers=0,
        device=CPU,
        verbose=False,
    )
    ours = distance(found[ResizeMode.LEGACY_PYTORCH].pooled.double() @ projection)
    assert theirs > 1e-2
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_distance_by_the_formula_of_pytorch_fid(
    found: dict[ResizeMode, Features], projection: Tensor
) -> None:
    for features in found.values():
        ours = features.pooled.double() @ projection
        statistics = [
            statistic
            for half in (ours[:FEW].numpy(), ours[FEW:].numpy())
            for statistic in (half.mean(axis=0), np.cov(half, rowvar=False))
        ]
        assert distance(ours) == pytest.approx(calculate_frechet_distance(*statistics), rel=1e-6)


def test_legacy_tensorflow_is_torch_fidelity(
    state_file: Path, images: np.ndarray, found: dict[ResizeMode, Features]
) -> None:
    network = FeatureExtractorInceptionV3("peer", ["2048", "logits_unbiased"], str(state_file))
    with torch.no_grad():
        pooled, logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    ours = found[ResizeMode.LEGACY_TENSORFLOW]
    torch.testing.assert_close(ours.pooled, pooled, rtol=1e-5, atol=1e-5)
    assert ours.probabilities is not None
    torch.testing.assert_close(ours.probabilities, logits.softmax(dim=1), rtol=1e-3, atol=1e-7)
    assert distance(ours.pooled) == pytest.approx(distance(pooled), rel=1e-6)


def test_modes_are_different_protocols(option: str, found: dict[ResizeMode, Features]) -> None:
    distances = {round(distance(features.pooled), 3) for features in found.values()}
    identities = {parse_choice(option, mode).identity for mode in ResizeMode}
    assert len(distances) == len(identities) == len(ResizeMode)


def test_both_files_of_one_network_agree(
    state: dict[str, Tensor], images: np.ndarray, found: dict[ResizeMode, Features], tmp_path: Path
) -> None:
    network = build()
    network.load_state_dict(state, assign=True)
    blocks = [block for name, block in network.named_children() if name not in ("avgpool", "dropout", "fc")]
    layers = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    traced = torch.jit.trace(layers.eval(), torch.zeros(1, 3, 299, 299), check_trace=False)
    module = RandomInception(traced)
    module.output.load_state_dict({"weight": state["fc.weight"], "bias": state["fc.bias"]})
    path = tmp_path / "inception.pt"
    torch.jit.script(module.eval()).save(str(path))
    choice = parse_choice(f"inception={path}#sha256={sha256_hex(path.read_bytes())}")
    scripted = open_network(choice, CPU)(images[:1])
    ours = found[ResizeMode.CLEAN]
    torch.testing.assert_close(scripted.pooled, ours.pooled[:1], rtol=1e-5, atol=1e-5)
    assert ours.probabilities is not None
    torch.testing.assert_close(scripted.probabilities, ours.probabilities[:1], rtol=1e-3, atol=1e-7)


def test_spatial_features_are_adms(
    state: dict[str, Tensor], images: np.ndarray, found: dict[ResizeMode, Features]
) -> None:
    # Block mixed_6 of the graph, counted from `mixed`: 7 channels of its first branch, as (y, x, channel).
    network = build()
    network.load_state_dict(state, assign=True)
    blocks = dict(network.named_children())
    mixed = [name for name in blocks if name.startswith("Mixed")]
    assert len(mixed) == 11
    inside = nn.Sequential(*(blocks[name] for name in list(blocks)[: list(blocks).index(mixed[6])])).eval()
    resized = torch.from_numpy(
        np.stack([cleanfid.fid.build_resizer("clean")(image) for image in images[:2]]).transpose(0, 3, 1, 2)
    )
    with torch.no_grad():
        expected = blocks[mixed[6]](inside((resized - 128) / 128))[:, :7].permute(0, 2, 3, 1).reshape(2, -1)
    spatial = found[ResizeMode.CLEAN].spatial
    assert spatial is not None
    assert spatial.shape == (2 * FEW, STATE_INCEPTION.spatial)
    torch.testing.assert_close(spatial[:2], expected, rtol=1e-4, atol=1e-4)


def test_safetensors(
    state: dict[str, Tensor], images: np.ndarray, found: dict[ResizeMode, Features], tmp_path: Path
) -> None:
    path = tmp_path / "inception.safetensors"
    safetensors.torch.save_file(state, path)
    choice = parse_choice(f"inception-state={path}#sha256={sha256_hex(path.read_bytes())}")
    network = open_network(choice, CPU)
    for number in range(2):  # one call keeps nothing for the next
        again = network(images[number : number + 1])
        for name in ("pooled", "spatial"):
            expected = getattr(found[ResizeMode.CLEAN], name)[number : number + 1]
            torch.testing.assert_close(getattr(again, name), expected, rtol=1e-4, atol=1e-4)


def test_names() -> None:
    assert STATE_INCEPTION.sha256[:8] in STATE_FILE.url
    assert (STATE_INCEPTION.distance_name, STATE_INCEPTION.score_name) == ("FID", "IS")
    assert STATE_INCEPTION.spatial_name == "sFID"
    other = STATE_INCEPTION.model_copy(update={"sha256": "ab" * 32})
    assert other.distance_name == "FD-inception-state-abababab"
    assert other.spatial_name == "sFD-inception-state-abababab"


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code of a pickle ran",))


def test_not_that_state_dict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.pth"
    bad = [{}, {"fc.weight": torch.zeros(1000, 2048)}, [1], Harmful()]
    for content in bad:
        torch.save(content, path)
        choice = parse_choice(f"inception-state={path}#sha256={sha256_hex(path.read_bytes())}")
        with pytest.raises(UserError, match="no state dict of the Inception with 1008 classes") as refused:
            open_network(choice, CPU)
        assert "\n" not in str(refused.value)
    for data in (b"", b"nothing", b"12345678{nothing"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="no state dict of the Inception"):
            open_network(parse_choice(f"inception-state={path}#sha256={sha256_hex(data)}"), CPU)
    assert "ran" not in capsys.readouterr().out


def test_missing_or_other_file_names_the_official_one(state_file: Path) -> None:
    for place in ("/nowhere/inception.pth", str(state_file)):
        with pytest.raises(UserError) as refused:
            open_network(parse_choice(f"inception-state={place}"), CPU)
        line = str(refused.value)
        assert f"{STATE_FILE.url}, 95628359 bytes, sha256 {STATE_FILE.sha256}" in line
        assert "\n" not in line


@pytest.mark.parametrize("mode", [ResizeMode.CLEAN, ResizeMode.LEGACY_TENSORFLOW])
def test_torchscript_modes_are_clean_fid(mode: ResizeMode, tmp_path: Path) -> None:
    # Their wrapper of the TorchScript file, by the name that it looks for; few layers, so many pictures.
    torch.manual_seed(1)
    file = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(RandomInception().eval()).save(str(file))
    images = np.random.default_rng(5).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)
    images[30:] //= 2
    inside = mode is ResizeMode.LEGACY_TENSORFLOW
    extract = InceptionV3W(str(tmp_path), download=False, resize_inside=inside).eval()
    theirs = cleanfid.fid.compute_fid(
        *folders(images, tmp_path),
        mode=str(mode),
        custom_feat_extractor=lambda x: extract(x)[:, :12],
        num_workers=0,
        device=CPU,
        verbose=False,
    )
    choice = parse_choice(f"inception={file}#sha256={sha256_hex(file.read_bytes())}", mode)
    network = open_network(choice, CPU)
    found = network(images)
    assert theirs > 1e-2
    assert distance(found.pooled[:, :12]) == pytest.approx(theirs, rel=1e-6)
    assert choice.identity.resize.startswith("clean-fid/")
