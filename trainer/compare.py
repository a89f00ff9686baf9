"""How two checkpoints of a run differ: where they are, what trained them, how far their weights lie apart."""

import math
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from data_pipeline.documents import Document
from trainer.manifest import FileEntry, Manifest
from trainer.parts import read_part
from trainer.recipe import differences
from trainer.run import Run


class TensorChange(BaseModel):
    """How far one parameter has moved."""

    model_config = ConfigDict(frozen=True)

    parameter: str
    relative_l2: float
    """Norm of the difference over the norm of the first one."""
    largest: float
    """Largest absolute difference of a number."""


class PartChange(BaseModel):
    """How far the weights, or one average of them, have moved."""

    model_config = ConfigDict(frozen=True)

    name: str
    """`raw`, or an EMA profile."""
    identical: bool
    relative_l2: float
    tensors: list[TensorChange]
    """The most changed first."""


class Difference(Document):
    """What two checkpoints do not have in common."""

    SCHEMA: ClassVar[str] = "checkpoint-diff/1"

    run: str
    first: str
    second: str
    manifest: dict[str, tuple[str, str]]
    """Keys of the manifests that differ, with both values."""
    recipe: dict[str, str]
    """Keys of the recipes that differ, with a line about each."""
    weights: list[PartChange]
    only_in_one: list[str]
    """Averages that one of them lacks."""


def compare(run: Run, first: str, second: str) -> Difference:
    """Compare two published checkpoints of a run.

    Raises:
        CheckpointGoneError: One is not published (any more).
        DamagedCheckpointError: Weights of one are damaged.
    """
    one, other = run.manifest(first), run.manifest(second)
    mine, theirs = _weights_of(one), _weights_of(other)
    return Difference(
        run=run.url,
        first=first,
        second=second,
        manifest=_manifest_changes(one, other),
        recipe=differences(run.recipe_of(one), run.recipe_of(other)),
        weights=[
            _change(name, read_part(run, one, mine[name]), read_part(run, other, theirs[name]))
            for name in mine
            if name in theirs
        ],
        only_in_one=sorted(mine.keys() ^ theirs.keys()),
    )


def _manifest_changes(one: Manifest, other: Manifest) -> dict[str, tuple[str, str]]:
    mine, theirs = (
        manifest.model_dump(mode="json", exclude={"files", "checksums"}) for manifest in (one, other)
    )
    return {key: (str(mine[key]), str(theirs[key])) for key in mine if mine[key] != theirs[key]}


def _weights_of(manifest: Manifest) -> dict[str, FileEntry]:
    return {entry.ema or "raw": entry for entry in manifest.files if entry.role in ("weights", "ema")}


def _change(name: str, one: dict[str, Tensor], other: dict[str, Tensor]) -> PartChange:
    """Compare tensors of the same names; a run's network never changes."""
    tensors, squares, norms = [], 0.0, 0.0
    for parameter, before in one.items():
        change, before = other[parameter].double() - before.double(), before.double()
        square, norm = float(change.square().sum()), float(before.square().sum())
        squares, norms = squares + square, norms + norm
        tensors.append(
            TensorChange(
                parameter=parameter,
                relative_l2=_ratio(square, norm),
                largest=float(change.abs().max()) if change.numel() else 0.0,
            )
        )
    tensors.sort(key=lambda each: each.relative_l2, reverse=True)
    identical = all(torch.equal(one[parameter], other[parameter]) for parameter in one)
    return PartChange(name=name, identical=identical, relative_l2=_ratio(squares, norms), tensors=tensors)


def _ratio(square: float, norm: float) -> float:
    """Root of a quotient of squares; a parameter that was zero may have moved by anything."""
    return math.sqrt(square / max(norm, 1e-30))
