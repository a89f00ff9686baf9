"""What the tests of this room build: an Inception with random weights, a finished run."""

from pathlib import Path

import torch
from torch import Tensor, nn

from data_pipeline.index import load_index
from eval.features.inception_state import build
from tests.support import make_run
from trainer.manifest import AttemptEnd
from trainer.run import Run


class RandomInception(nn.Module):
    """Random weights behind NVIDIA's interface: `layers`, `forward(..., no_output_bias)`.

    By default the layers are few; they may be those of the whole Inception.
    """

    def __init__(self, layers: nn.Module | None = None) -> None:
        super().__init__()
        few = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(128, 2048),
        )
        self.layers = layers or few
        self.output = nn.Linear(2048, 1008)

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        features = self.layers((img - 128) / 128)
        if return_features:
            return features
        logits = features @ self.output.weight.t()
        if not no_output_bias:
            logits = logits + self.output.bias
        return logits.softmax(dim=1)


def random_inception_state(seed: int) -> dict[str, Tensor]:
    """Random weights for the whole Inception, by pytorch-fid's key names; features of photographs differ."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, empty in build().state_dict().items():
        noise = torch.empty(empty.shape, dtype=torch.float32).normal_(generator=generator)
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(1)
        elif noise.ndim > 1:
            state[key] = noise * (2 / noise[0].numel()) ** 0.5
        elif key.endswith(("bn.weight", "running_var")):
            state[key] = (noise * 0.1).exp()
        else:
            state[key] = noise * 0.1
    return state


def start_run(
    folder: Path, data_url: str, images: tuple[int, ...] = (64, 128), overrides: tuple[str, ...] = ()
) -> Run:
    """A run whose only attempt published checkpoints after so many images and then finished."""
    made = make_run(
        str(folder),
        recipe_overrides=[f"data.url={data_url}", *overrides],
        images_list=images,
        index_sha=load_index(data_url).sha256,
    )
    end = AttemptEnd(attempt=1, outcome="finished", images=images[-1], checkpoint=made.checkpoints()[-1])
    made.end_attempt(end)
    return made
