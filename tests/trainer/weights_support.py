"""Networks of other code bases for the tests of weights: what they compute, under their own names."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support import publish_checkpoint
from tests.trainer.unet_support import (
    PAPER_KNOBS,
    diffusers_network,
    inputs,
    openai_network,
    randomise,
)
from trainer.recipe import Recipe, load_recipe
from trainer.run import Run
from trainer.unet import UNet
from trainer.unet_config import UNetConfig
from trainer.weights.imports import Imported, ImportOptions, import_weights

PAPER = UNetConfig(
    image_size=16,
    base_channels=32,
    channel_multipliers=(1, 1, 2),
    num_res_blocks=1,
    attention_resolutions=(8,),
)
"""Small, with the 32 groups of other code bases; one level is as wide as that before it, one is not."""


SMALL = (
    "image.size=8",
    "model.base_channels=8",
    "model.channel_multipliers=[1,2]",
    "model.num_res_blocks=1",
    "model.attention_resolutions=[4]",
    "model.norm_groups=4",
)


def small_recipe(overrides: Sequence[str] = ()) -> Recipe:
    return load_recipe("quickstart", [*SMALL, *overrides])


def random_run(url: Path, overrides: Sequence[str] = (), images: Sequence[int] = (64,)) -> Run:
    """A run whose checkpoints hold weights far from any special value."""
    recipe, run = small_recipe(overrides), Run(str(url))
    run.adopt_recipe(recipe)
    attempt = run.claim_attempt(None, "test-host", recipe, "0" * 64)
    for seen in images:
        model = UNet(recipe.unet_config())
        randomise(model, seen)
        publish_checkpoint(run, recipe, attempt.attempt, seen, model, "0" * 64)
    return run


class PaperNetwork:
    """The paper's network as a function over variables that come into being when it first asks for them.

    Written from the paper's appendix B and the names alone; nothing of the package takes part.

    Args:
        config: Shape of the network.
        style: "pesser" for torch's layouts and dotted names, "tensorflow" for HWIO and scopes.
    """

    def __init__(self, config: UNetConfig, style: Literal["pesser", "tensorflow"]) -> None:
        self.config, self.tf = config, style == "tensorflow"
        self.variables: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(5)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        c = self.config
        half = c.base_channels // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000.0) * torch.arange(half) / (half - 1))
        temb = torch.cat([angles.sin(), angles.cos()], dim=1)
        dense = ("temb/dense0", "temb/dense1") if self.tf else ("temb.dense.0", "temb.dense.1")
        temb = self._dense(
            dense[1], F.silu(self._dense(dense[0], temb, 4 * c.base_channels)), 4 * c.base_channels
        )
        hs = [self._conv(self._at("conv_in"), x, c.base_channels)]
        for i, multiplier in enumerate(c.channel_multipliers):
            for j in range(c.num_res_blocks):
                hs.append(self._block_and_attention("down", i, j, hs[-1], temb, c.base_channels * multiplier))
            if i < len(c.channel_multipliers) - 1:
                padded = F.pad(hs[-1], (0, 1, 0, 1))
                name = self._at(("down", i), "downsample", "conv")
                hs.append(self._conv(name, padded, hs[-1].shape[1], stride=2, padding=0))
        h = self._residual(self._at("mid", ("block", 1), numbered="_"), hs[-1], temb, hs[-1].shape[1])
        h = self._attention(self._at("mid", ("attn", 1), numbered="_"), h)
        h = self._residual(self._at("mid", ("block", 2), numbered="_"), h, temb, h.shape[1])
        for i, multiplier in reversed(list(enumerate(c.channel_multipliers))):
            for j in range(c.num_res_blocks + 1):
                h = torch.cat([h, hs.pop()], dim=1)
                h = self._block_and_attention("up", i, j, h, temb, c.base_channels * multiplier)
            if i:
                doubled = h.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
                h = self._conv(self._at(("up", i), "upsample", "conv"), doubled, h.shape[1])
        return self._conv(self._at("conv_out"), F.silu(self._norm(self._at("norm_out"), h)), c.out_channels)

    def _at(self, *parts: str | tuple[str, int], numbered: str = ".") -> str:
        """A name: pesser numbers with a dot (in the middle with "_"), TensorFlow always with "_"."""
        joint = "_" if self.tf else numbered
        return ("/" if self.tf else ".").join(
            part if isinstance(part, str) else f"{part[0]}{joint}{part[1]}" for part in parts
        )

    def _block_and_attention(
        self, way: str, i: int, j: int, h: Tensor, temb: Tensor, channels: int
    ) -> Tensor:
        h = self._residual(self._at((way, i), ("block", j)), h, temb, channels)
        if h.shape[2] in self.config.attention_resolutions:
            h = self._attention(self._at((way, i), ("attn", j)), h)
        return h

    def _residual(self, scope: str, x: Tensor, temb: Tensor, channels: int) -> Tensor:
        slash = "/" if self.tf else "."
        h = self._conv(f"{scope}{slash}conv1", F.silu(self._norm(f"{scope}{slash}norm1", x)), channels)
        h = h + self._dense(f"{scope}{slash}temb_proj", F.silu(temb), channels)[:, :, None, None]
        h = self._conv(f"{scope}{slash}conv2", F.silu(self._norm(f"{scope}{slash}norm2", h)), channels)
        if x.shape[1] != channels:
            x = self._nin(f"{scope}{slash}nin_shortcut", x, channels)
        return x + h

    def _attention(self, scope: str, x: Tensor) -> Tensor:
        slash = "/" if self.tf else "."
        h = self._norm(f"{scope}{slash}norm", x)
        q, k, v = (self._nin(f"{scope}{slash}{name}", h, x.shape[1]) for name in "qkv")
        weights = torch.einsum("bcyx,bcYX->byxYX", q, k) * x.shape[1] ** -0.5
        weights = weights.flatten(3).softmax(-1).view_as(weights)
        return x + self._nin(
            f"{scope}{slash}proj_out", torch.einsum("byxYX,bcYX->bcyx", weights, v), x.shape[1]
        )

    def _conv(self, name: str, x: Tensor, out: int, stride: int = 1, padding: int = 1) -> Tensor:
        if self.tf:
            weight = self._variable(f"{name}/W", 3, 3, x.shape[1], out).permute(3, 2, 0, 1)
        else:
            weight = self._variable(f"{name}.weight", out, x.shape[1], 3, 3)
        return F.conv2d(x, weight, self._bias(name, out), stride=stride, padding=padding)

    def _nin(self, name: str, x: Tensor, out: int) -> Tensor:
        if self.tf:
            mixed = torch.einsum("bcyx,cd->bdyx", x, self._variable(f"{name}/W", x.shape[1], out))
            return mixed + self._bias(name, out)[:, None, None]
        return F.conv2d(x, self._variable(f"{name}.weight", out, x.shape[1], 1, 1), self._bias(name, out))

    def _dense(self, name: str, x: Tensor, out: int) -> Tensor:
        if self.tf:
            return x @ self._variable(f"{name}/W", x.shape[1], out) + self._bias(name, out)
        return F.linear(x, self._variable(f"{name}.weight", out, x.shape[1]), self._bias(name, out))

    def _norm(self, name: str, x: Tensor) -> Tensor:
        gamma, beta = ("/gamma", "/beta") if self.tf else (".weight", ".bias")
        gain = self._variable(name + gamma, x.shape[1], around=1.0)
        return F.group_norm(x, 32, gain, self._variable(name + beta, x.shape[1]), eps=1e-6)

    def _bias(self, name: str, out: int) -> Tensor:
        return self._variable(name + ("/b" if self.tf else ".bias"), out)

    def _variable(self, name: str, *shape: int, around: float = 0.0) -> Tensor:
        if name not in self.variables:
            self.variables[name] = around + 0.05 * torch.randn(*shape, generator=self._generator)
        assert self.variables[name].shape == shape, name
        return self.variables[name]


@cache
def paper_variables(
    config: UNetConfig, style: Literal["pesser", "tensorflow"]
) -> tuple[dict[str, Tensor], Tensor]:
    """Random variables of the paper's network by their names in one style, and its output on `inputs`."""
    network = PaperNetwork(config, style)
    found = network(*inputs(config))
    assert float(found.abs().max()) > 0.3
    return network.variables, found


def openai_unet(config: UNetConfig, **options: Any) -> nn.Module:
    """OpenAI's network of the same shape, with random weights."""
    model = openai_network(config, **options)
    randomise(model)
    return model.eval()


def diffusers_unet(config: UNetConfig, **options: Any) -> nn.Module:
    """diffusers' network of the same shape, with random weights; unset options are the paper's."""
    model = diffusers_network(config, **(PAPER_KNOBS | options))
    randomise(model)
    return model.eval()


def as_npz(path: str, variables: dict[str, Tensor]) -> None:
    np.savez(path, **{name: tensor.numpy() for name, tensor in variables.items()})


def other(config: UNetConfig, **changes: Any) -> UNetConfig:
    return replace(config, **changes)


OURS = (
    "image.size=16",
    "image.channels=3",
    "model.base_channels=32",
    "model.channel_multipliers=[1,1,2]",
    "model.num_res_blocks=1",
    "model.attention_resolutions=[8]",
    "model.norm_groups=32",
    "diffusion.num_timesteps=1000",
)
"""The recipe of `PAPER`."""
OPENAI = ("model.profile=openai", "model.num_heads=4")


def paper_recipe(overrides: Sequence[str] = ()) -> Recipe:
    return load_recipe("quickstart", [*OURS, *overrides])


def bring(
    source: Path, run: Path, overrides: Sequence[str] = (), options: ImportOptions | None = None
) -> Imported:
    return import_weights(str(source), paper_recipe(overrides), Run(str(run)), options or ImportOptions())


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(dict(tensors), path)
