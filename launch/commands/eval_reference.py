"""`ddpm eval reference`: statistics of real pictures, taken now or published by others."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from data_pipeline.errors import ExitCode, UserError
from launch.commands.eval_team import AsJson, FeaturesOption, Threads, joined_team

if TYPE_CHECKING:
    from eval.moments import Moments

Place = Annotated[
    str,
    typer.Argument(metavar="SHARDS", help="A data set: its folder or URL; or a file FILE.npz to look at."),
]


def reference(
    place: Place,
    split: Annotated[str, typer.Option(help="train or val.")] = "train",
    features: FeaturesOption = None,
    resize: Annotated[
        str, typer.Option(help="clean, legacy_tensorflow or legacy_pytorch, as clean-fid names them.")
    ] = "clean",
    limit: Annotated[
        int | None, typer.Option(min=2, help="The first so many pictures. Default: all.")
    ] = None,
    spatial: Annotated[bool, typer.Option(help="Spatial features too, for sFID.")] = False,
    store: Annotated[
        bool, typer.Option(help="Keep each picture's features, for KID, precision, recall.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write mu and sigma as .npz, as clean-fid and pytorch-fid read them.")
    ] = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Take statistics of real pictures into the cache, where evaluations find them.

    The cache is the folder or URL of DDPM_REFERENCES, by default ddpm-foundry/references in the user's cache
    folder. Given a file FILE.npz of clean-fid, pytorch-fid, ADM or EDM, tell what it holds and how a recipe
    names it.
    """
    if place.partition("#")[0].endswith(".npz"):
        facts = _file_facts(place)
    else:
        facts = _take(place, split, features or "effnetlite0", resize, limit, spatial, store, out, threads)
    if facts and as_json:
        print(json.dumps(facts, indent=2))
    elif facts:
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name:{width}}  {value}")


def _file_facts(place: str) -> dict[str, Any]:
    from data_pipeline.documents import sha256_hex
    from eval.imported import StatisticsKind, read_arrays, read_bytes

    location = place.partition("#")[0]
    data = read_bytes(location)
    arrays = read_arrays(data, location)
    sha256 = sha256_hex(data)
    kinds = ", ".join(StatisticsKind)
    return {
        "file": location,
        "sha256": sha256,
        "features": len(arrays["mu"]),
        "spatial features": len(arrays["mu_s"]) if "mu_s" in arrays else 0,
        "trace of the covariance": float(arrays["sigma"].trace()),
        "in a recipe": f"reference_file: {location}#sha256={sha256}&kind=KIND with KIND one of {kinds}",
    }


def _take(
    place: str,
    split: str,
    features: str,
    resize: str,
    limit: int | None,
    spatial: bool,
    store: bool,
    out: Path | None,
    threads: int | None,
) -> dict[str, Any]:
    """Take the statistics; nothing to show outside the main process."""
    from eval.features import ResizeMode, open_network, parse_choice
    from eval.reference import RealJob, real_statistics
    from eval.reference_cache import ReferenceCache
    from eval.team import Stopped

    if resize not in set(ResizeMode):
        raise UserError(f"--resize {resize}: unknown; known: {', '.join(ResizeMode)}")
    choice = parse_choice(features, ResizeMode(resize))
    if spatial and not choice.identity.spatial:
        raise UserError(
            f"--spatial: {choice.identity.name} gives no spatial features; use inception-state=FILE"
        )
    cache = ReferenceCache()
    with joined_team(threads) as team:
        try:
            network = team.together(lambda: open_network(choice, team.device))
            wanted = RealJob(place, split, limit=limit, spatial=spatial, store=store)
            found = real_statistics(team, network, wanted, cache)
        except Stopped:
            raise typer.Exit(ExitCode.REQUEUE) from None
        if not team.is_main:
            return {}
    if out is not None:
        _write(out, found.moments)
    return {
        "pictures": found.moments.count,
        "of one colour": found.constant,
        "features": f"{choice.identity.name}, sha256 {choice.identity.sha256}, {choice.identity.resize}",
        "norm of the mean": float(found.moments.mean.norm()),
        "trace of the covariance": float(found.moments.covariance.trace()),
        "cache": cache.url,
    }


def _write(file: Path, moments: "Moments") -> None:
    import numpy as np

    try:
        np.savez(file, mu=moments.mean.numpy(), sigma=moments.covariance.numpy())
    except OSError as error:
        raise UserError(f"{file}: cannot write statistics ({error.strerror}); choose another file") from error
