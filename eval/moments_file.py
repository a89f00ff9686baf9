"""Moments as a safetensors file: `reference.safetensors` beside results and in the cache of references.

Tensors `mean` [d] and `scatter` [d, d], and `spatial_mean`, `spatial_scatter` where they were taken, all
float64; in the metadata the schema, the count, and whatever tells the pictures and the network.
"""

import json
from collections.abc import Mapping
from typing import Final

import safetensors
import safetensors.torch

from data_pipeline.errors import UserError
from eval.moments import Moments

_SCHEMA: Final = "reference/1"


def dump_moments(moments: Moments, spatial: Moments | None, facts: Mapping[str, str]) -> bytes:
    """Serialise moments, with `facts` in the metadata."""
    tensors = {"mean": moments.mean, "scatter": moments.scatter}
    if spatial is not None:
        tensors |= {"spatial_mean": spatial.mean, "spatial_scatter": spatial.scatter}
    return safetensors.torch.save(tensors, metadata={"schema": _SCHEMA, "count": str(moments.count), **facts})


def load_moments(data: bytes, where: str) -> tuple[Moments, Moments | None]:
    """Read moments, and spatial ones if there are any.

    Args:
        data: The file's bytes.
        where: The file's name for error messages.

    Raises:
        UserError: The file is damaged or of another version.
    """
    try:
        tensors = safetensors.torch.load(data)
        # The header: its length as 8 bytes, then JSON.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        facts = header["__metadata__"]
        count = int(facts["count"])
        moments = Moments(count, tensors["mean"], tensors["scatter"])
        spatial = None
        if "spatial_mean" in tensors:
            spatial = Moments(count, tensors["spatial_mean"], tensors["spatial_scatter"])
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{where}: damaged ({error}); delete it, it will be computed again") from error
    if facts.get("schema") != _SCHEMA:
        raise UserError(
            f"{where}: schema is {facts.get('schema')!r}, this version reads {_SCHEMA!r}; delete it"
        )
    return moments, spatial
