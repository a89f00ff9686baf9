"""Small networks for the tests of the U-Net, and the same networks as diffusers and OpenAI build them."""

from typing import Any

import torch
from diffusers import UNet2DModel
from guided_diffusion.unet import UNetModel
from torch import Tensor, nn

from trainer.unet import UNet, UNetConfig

SMALL = UNetConfig(
    image_size=16,
    base_channels=32,
    channel_multipliers=(1, 2, 2),
    num_res_blocks=2,
    attention_resolutions=(8,),
)
TINY = UNetConfig(
    image_size=8,
    in_channels=1,
    out_channels=1,
    base_channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
    norm_groups=4,
)
# What makes diffusers' network the paper's.
PAPER_KNOBS: dict[str, Any] = {
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights far from any special value: near-zero layers would hide what they multiply."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = name.endswith("weight") and p.ndim == 1  # of a normalisation, whatever it is called
            p.normal_(1.0 if gain else 0.0, 0.05, generator=generator)


def random_unet(config: UNetConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> UNet:
    model = UNet(config)
    randomise(model, seed)
    return model.to(dtype).eval()


def inputs(config: UNetConfig, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, config.in_channels, config.image_size, config.image_size, generator=generator)
    return x.to(dtype), torch.tensor([0, 1, 500, 999])


def output(model: nn.Module, config: UNetConfig, *labels: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(*inputs(config, next(model.parameters()).dtype), *labels)
    tensor = getattr(found, "sample", found)
    assert isinstance(tensor, Tensor)
    assert float(tensor.abs().max()) > 0.3  # not a comparison of zeros
    return tensor


def diffusers_name(name: str, levels: int) -> str:
    """The name diffusers gives one of our parameters."""
    *parts, kind = name.split(".")
    block = {"time_proj": "time_emb_proj", "shortcut": "conv_shortcut"}
    attention = {"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
    match parts:
        case ["time_embed", index]:
            theirs = f"time_embedding.linear_{1 + int(index) // 2}"
        case ["class_embed"]:
            theirs = "class_embedding"
        case ["stem"]:
            theirs = "conv_in"
        case ["head", layer]:
            theirs = f"conv_{layer}_out".replace("conv_conv_out", "conv_out")
        case ["mid", "attention", layer]:
            theirs = f"mid_block.attentions.0.{attention[layer]}"
        case ["mid", which, layer]:
            theirs = f"mid_block.resnets.{int(which[-1]) - 1}.{block.get(layer, layer)}"
        case [way, level, *rest]:
            place = int(level) if way == "down" else levels - 1 - int(level)
            match rest:
                case ["blocks", j, layer]:
                    tail = f"resnets.{j}.{block.get(layer, layer)}"
                case ["attentions", j, layer]:
                    tail = f"attentions.{j}.{attention[layer]}"
                case _:
                    tail = f"{way}samplers.0.conv"
            theirs = f"{way}_blocks.{place}.{tail}"
    return f"{theirs}.{kind}"


def diffusers_network(config: UNetConfig, **knobs: Any) -> UNet2DModel:
    """Diffusers' network of the same shape; `knobs` are its own options."""
    attends = [resolution in config.attention_resolutions for resolution in config.resolutions]
    return UNet2DModel(
        sample_size=config.image_size,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        layers_per_block=config.num_res_blocks,
        block_out_channels=config.widths,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        **{"norm_num_groups": config.norm_groups} | knobs,
    )


def diffusers_twin(ours: UNet, **knobs: Any) -> UNet2DModel:
    """The same with our weights."""
    theirs, levels = diffusers_network(ours.config, **knobs), len(ours.config.widths)
    theirs.load_state_dict(
        {diffusers_name(name, levels): p for name, p in ours.state_dict().items()}, strict=True
    )
    return theirs.to(ours.stem.weight.dtype).eval()


def openai_places(config: UNetConfig) -> dict[str, str]:
    """Where OpenAI's network keeps our blocks: it numbers them through on each way."""
    places = {"time_embed.0": "time_embed.0", "time_embed.2": "time_embed.2", "class_embed": "label_emb"}
    places |= {"stem": "input_blocks.0.0", "head.norm": "out.0", "head.conv": "out.2"}
    middle = ("mid.block1", "mid.attention", "mid.block2")
    places |= {ours: f"middle_block.{index}" for index, ours in enumerate(middle)}
    number, last = 1, len(config.widths) - 1
    for level in range(last + 1):
        for block in range(config.num_res_blocks):
            places[f"down.{level}.blocks.{block}"] = f"input_blocks.{number}.0"
            places[f"down.{level}.attentions.{block}"] = f"input_blocks.{number}.1"
            number += 1
        places[f"down.{level}.downsample.conv"] = f"input_blocks.{number}.0.op"
        number += 1
    number = 0
    for level in range(last, -1, -1):
        for block in range(config.num_res_blocks + 1):
            places[f"up.{level}.blocks.{block}"] = f"output_blocks.{number}.0"
            places[f"up.{level}.attentions.{block}"] = f"output_blocks.{number}.1"
            number += 1
        after = 2 if config.attends(level) else 1
        places[f"up.{level}.upsample.conv"] = f"output_blocks.{number - 1}.{after}.conv"
    return places


OPENAI_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "shortcut": "skip_connection",
    "norm": "norm",
    "out": "proj_out",
}


def openai_weights(ours: UNet) -> dict[str, Tensor]:
    """Our weights under OpenAI's names: query, key and value of each head one after the other."""
    places, theirs = openai_places(ours.config), {}
    state = dict(ours.state_dict())
    for name, tensor in state.items():
        module, kind = name.rsplit(".", 1)
        if module in places:
            theirs[f"{places[module]}.{kind}"] = tensor
            continue
        place, layer = module.rsplit(".", 1)
        if layer == "query":
            heads = ours.config.heads(len(tensor))
            parts = [state[f"{place}.{which}.{kind}"] for which in ("query", "key", "value")]
            fused = torch.cat([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 1)
            theirs[f"{places[place]}.qkv.{kind}"] = fused[..., None] if kind == "weight" else fused
        elif layer not in ("key", "value"):
            wide = tensor[..., None] if (layer, kind) == ("out", "weight") else tensor
            theirs[f"{places[place]}.{OPENAI_LAYERS[layer]}.{kind}"] = wide
    return theirs


def openai_network(config: UNetConfig, **options: Any) -> UNetModel:
    """OpenAI's network of the same shape; `options` are its own."""
    return UNetModel(
        image_size=config.image_size,
        in_channels=config.in_channels,
        model_channels=config.base_channels,
        out_channels=config.out_channels,
        num_res_blocks=config.num_res_blocks,
        attention_resolutions=[config.image_size // height for height in config.attention_resolutions],
        channel_mult=config.channel_multipliers,
        **options,
    )


def openai_twin(ours: UNet, **options: Any) -> UNetModel:
    """The same with our weights, time and classes entering as in ours."""
    config = ours.config
    theirs = openai_network(
        config,
        num_classes=None if config.num_classes is None else config.num_classes + 1,
        use_scale_shift_norm=config.scale_shift_norm,
        **options,
    )
    theirs.load_state_dict(openai_weights(ours), strict=True)
    return theirs.to(ours.stem.weight.dtype).eval()
