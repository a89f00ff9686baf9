"""`ddpm data …`: build data sets and look into them. Thin shells over `data_pipeline`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.encoding import Encoding
from data_pipeline.errors import ExitCode, UserError
from data_pipeline.geometry import Geometry

if TYPE_CHECKING:
    from data_pipeline.build import BuildOptions
    from data_pipeline.documents import Document
    from data_pipeline.sources import Source

app = typer.Typer(no_args_is_help=True, help="Build indexed WebDataset shards and look into them.")

DataUrl = Annotated[str, typer.Argument(metavar="URL", help="A finished data set: folder or fsspec URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Split = Annotated[str, typer.Option(help="train or val.")]
Seed = Annotated[int, typer.Option(help="Seed of the order.")]
WindowShards = Annotated[int, typer.Option(min=1, help="Shards that are mixed with each other.")]
Position = Annotated[int, typer.Option(min=0, help="First stream position.")]


class Kind(StrEnum):
    """Sources of pictures."""

    DIGITS = "digits"
    FOLDER = "folder"


@app.command()
def build(
    kind: Annotated[Kind, typer.Argument(help="digits: embedded, 8 x 8 grey. folder: one's own pictures.")],
    source: Annotated[str | None, typer.Argument(help="folder: the folder with the pictures.")] = None,
    *,
    out: Annotated[str, typer.Option(help="Where the shards go: folder or fsspec URL (s3://bucket/prefix).")],
    size: Annotated[
        int | None, typer.Option(help="Side of the pictures in pixels. Default: the source's, if all agree.")
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="1 grey, 3 RGB. Default: digits 1, folder 3.", show_default=False)
    ] = None,
    geometry: Annotated[
        Geometry | None,
        typer.Option(
            help="none: pictures have the size. ddpm-lsun: centre crop, Lanczos. Default: as needed."
        ),
    ] = None,
    encoding: Annotated[
        Encoding, typer.Option(help="png: pixels without loss. source: keep the files' own bytes.")
    ] = Encoding.PNG,
    val_fraction: Annotated[
        float | None, typer.Option(help="Share kept for validation. Default: digits 0.2, folder 0.05.")
    ] = None,
    shard_bytes: Annotated[int, typer.Option(min=1, help="Largest size of a shard in bytes.")] = 8 << 20,
    max_rejected: Annotated[
        float, typer.Option(help="Share of unreadable pictures tolerated (one always is).")
    ] = 0.001,
    name: Annotated[str | None, typer.Option(help="Name of the data set. Default: the source's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Turn pictures into indexed WebDataset shards with a train and a val list.

    Pictures are told by content, turned upright by their EXIF orientation, flattened on white where
    transparent. Unreadable ones are listed in rejected.jsonl beside the shards; too many end the build.
    index.json is written last: without it the folder is no data set. The same build again changes nothing.

    Example: ddpm data build folder ~/pictures --size 64 --out s3://bucket/pictures
    """
    from data_pipeline.build import BuildOptions

    options = BuildOptions(
        size=size,
        geometry=geometry,
        encoding=encoding,
        channels=channels,
        val_fraction=val_fraction,
        shard_bytes=shard_bytes,
        max_rejected=max_rejected,
        name=name,
    )
    _build(_open_source(kind, source), out, options, as_json)


def _open_source(kind: Kind, source: str | None) -> "Source":
    if kind is Kind.DIGITS:
        if source is not None:
            raise UserError(f"{source}: digits are embedded and take no SOURCE; leave it out")
        from data_pipeline.sources.digits import DigitsSource

        return DigitsSource()
    if source is None:
        raise UserError("ddpm data build folder: name the folder with the pictures after `folder`")
    from data_pipeline.sources.folder import FolderSource

    return FolderSource(source)


def _build(source: "Source", out: str, options: "BuildOptions", as_json: bool) -> None:
    from data_pipeline import build as building
    from data_pipeline.inspect import summarise
    from data_pipeline.sources.folder import FolderSource

    found = building.find_built(source, out, options)
    if found is None:
        building.build(source, out, options)
    ignored = source.ignored if isinstance(source, FolderSource) else 0
    report = summarise(out, already_built=found is not None, ignored=ignored)
    lines = [
        f"{report.url}: {'already built' if report.already_built else 'built'}, "
        f"{report.samples['train']} train and {report.samples['val']} val pictures of "
        f"{report.size} x {report.size} x {report.channels} in {report.shards} shards",
        f"index.json sha256 {report.index_sha256}",
    ]
    if report.rejected:
        lines.append(f"{report.rejected} unreadable, see {report.url}/{building.REJECTED_FILE}")
    if ignored:
        lines.append(f"{ignored} other files in the folder are no pictures and were left out")
    _print(report, as_json, lines)


@app.command()
def verify(url: DataUrl, as_json: AsJson = False) -> None:
    """Read every byte and check sizes, SHA-256, CRC32C and that every picture decodes.

    Exit 0 if all is sound, 1 if not (every problem is listed with its shard and member).
    """
    from data_pipeline import inspect
    from data_pipeline.index import load_index

    report = inspect.verify(load_index(url))
    verdict = "sound" if not report.problems else f"{len(report.problems)} problem(s)"
    lines = [
        *report.problems,
        f"{report.url}: {report.samples} pictures in {report.shards} shards: {verdict}",
    ]
    _print(report, as_json, lines)
    if report.problems:
        raise typer.Exit(ExitCode.FAILED)


@app.command()
def stats(
    url: DataUrl,
    limit: Annotated[int, typer.Option(min=1, help="Pictures per split whose pixels are measured.")] = 10_000,
    as_json: AsJson = False,
) -> None:
    """Show what a data set holds: splits, shards, bytes, mean and deviation per channel."""
    from data_pipeline import inspect
    from data_pipeline.index import load_index

    report = inspect.stats(load_index(url), limit=limit)
    lines = [
        f"{report.name} ({report.kind}): {report.size} x {report.size} x {report.channels}, geometry "
        f"{report.geometry}, encoding {report.encoding}, {report.rejected} rejected"
    ]
    for split, found in report.splits.items():
        mean, std = (" ".join(f"{v:.2f}" for v in values) for values in (found.mean, found.std))
        lines.append(
            f"{split:5} {found.samples} pictures, {found.shards} shards, {found.bytes / 1e6:.1f} MB; "
            f"mean {mean}, std {std} (of 255, {found.pixels_of} pictures)"
        )
    lines.append(f"index.json sha256 {report.index_sha256}")
    _print(report, as_json, lines)


@app.command()
def preview(
    url: DataUrl,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("preview.png"),
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=4096, help="Number of pictures.")] = 64,
    split: Split = "train",
    seed: Seed = 0,
    position: Position = 0,
) -> None:
    """Write a contact sheet of pictures as training would see them in that order."""
    from data_pipeline import inspect
    from data_pipeline.index import load_index
    from data_pipeline.stream import ImageStream

    geometry = load_index(url).index.geometry
    with ImageStream(
        url,
        split=split,
        seed=seed,
        global_batch=count,
        position=position,
        channels=geometry.channels,
        image_size=geometry.size,
        prefetch_batches=1,
    ) as stream:
        sheet = inspect.contact_sheet(next(stream).images)
    try:
        sheet.save(out, "PNG")
    except OSError as error:
        raise UserError(
            f"{out}: cannot be written ({error.strerror or error}); name another --out"
        ) from error
    typer.echo(f"{out}: {count} pictures")


@app.command()
def order(
    url: DataUrl,
    split: Split = "train",
    seed: Seed = 0,
    window_shards: WindowShards = 16,
    position: Position = 0,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Number of positions.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Show which picture stands at which position of the training stream."""
    from data_pipeline import inspect
    from data_pipeline.index import load_index

    report = inspect.order_of(
        load_index(url), split=split, seed=seed, window_shards=window_shards, position=position, count=count
    )
    lines = [
        f"{row.position:>12} {row.epoch:>6} {row.shard} {row.member:>7} {row.key}" for row in report.rows
    ]
    _print(report, as_json, [f"{'position':>12} {'epoch':>6} {'shard':<16} {'member':>7} key", *lines])


def _print(report: "Document", as_json: bool, lines: list[str]) -> None:
    typer.echo(report.to_json().decode().rstrip() if as_json else "\n".join(lines))
