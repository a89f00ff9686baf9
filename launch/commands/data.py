"""`ddpm data …`: build data sets and look into them. Thin shells over `data_pipeline`."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_pipeline.encoding import Encoding
from data_pipeline.errors import ExitCode, UserError
from data_pipeline.geometry import Geometry
from data_pipeline.sources.kinds import Kind, open_source

if TYPE_CHECKING:
    from data_pipeline.build.plan import BuildOptions
    from data_pipeline.documents import Document
    from data_pipeline.inspect import BuildReport
    from data_pipeline.sources import Source

_SHARD_BYTES = 8 << 20
app = typer.Typer(no_args_is_help=True, help="Build indexed WebDataset shards and look into them.")

DataUrl = Annotated[str, typer.Argument(metavar="URL", help="A finished data set: folder or fsspec URL.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Split = Annotated[str, typer.Option(help="train or val.")]
Seed = Annotated[int, typer.Option(help="Seed of the order.")]
WindowShards = Annotated[int, typer.Option(min=1, help="Shards that are mixed with each other.")]
Start = Annotated[int, typer.Option(min=0, help="First stream position.")]


Workers = Annotated[
    int | None,
    typer.Option(
        min=1, help="Processes. Default: one for each core, fewer for few pictures.", show_default=False
    ),
]
ValFraction = Annotated[
    float | None,
    typer.Option(
        help="Share kept for validation, by content hash. Default: digits 0.2, lsun 0.01, else 0.05; "
        "cifar10 has its own test split.",
        show_default=False,
    ),
]
MaxRejected = Annotated[float, typer.Option(help="Share of unreadable pictures tolerated (one always is).")]


@app.command()
def build(
    kind: Annotated[Kind, typer.Argument(help="What SOURCE is; see below.")],
    source: Annotated[str | None, typer.Argument(help="Folder or file; webdataset: also a URL.")] = None,
    *,
    out: Annotated[str, typer.Option(help="Where the shards go: folder or fsspec URL (s3://bucket/prefix).")],
    size: Annotated[
        int | None,
        typer.Option(
            help="Side of the pictures in pixels. Default: lsun 256, else that of the first picture, which "
            "all must have.",
            show_default=False,
        ),
    ] = None,
    channels: Annotated[
        int | None, typer.Option(help="1 grey, 3 RGB. Default: what the kind has.", show_default=False)
    ] = None,
    geometry: Annotated[
        Geometry | None,
        typer.Option(
            help="How other shapes get there: ddpm-lsun, edm (centre crop, Lanczos), adm (box halving, "
            "bicubic, centre crop), box, none (they must have the size). Default: none if they have it, else "
            "ddpm-lsun.",
            show_default=False,
        ),
    ] = None,
    encoding: Annotated[
        str,
        typer.Option(
            metavar="source|png|jpeg:Q|webp-lossless|raw",
            help="What the shards hold. source keeps the bytes of pictures that fit as they are; "
            "docs/data.md has the costs.",
        ),
    ] = "png",
    labels: Annotated[
        bool,
        typer.Option("--labels", help="Take class labels from sub-folders, or the collection's own list."),
    ] = False,
    val_fraction: ValFraction = None,
    shard_bytes: Annotated[int, typer.Option(min=1, help="Largest size of a shard in bytes.")] = _SHARD_BYTES,
    max_rejected: MaxRejected = 0.001,
    name: Annotated[str | None, typer.Option(help="Name of the data set. Default: the source's.")] = None,
    workers: Workers = None,
    start_over: Annotated[
        bool, typer.Option("--start-over", help="Throw away another build that is unfinished at --out.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Turn pictures into indexed WebDataset shards with a train and a val list.

    KIND is lsun (LMDB as distributed, or its zip), celebahq (folder, zip, tar, TFRecords, npy), cifar10
    (python, binary, class folders), folder, zip or tar of pictures, npz (arrays), webdataset (tars that are
    there: only indexed, bytes untouched), digits (embedded).

    Pictures are told by content, turned upright by their EXIF orientation, flattened on white where
    transparent. Unreadable ones are listed in rejected.jsonl beside the shards; over the budget the build
    fails at its end. Equal pictures are listed in duplicates.jsonl. A build that was killed goes on when the
    same command runs again and ends with the same bytes. index.json is written last: without it the folder is
    no data set. The same build again changes nothing.

    Example: ddpm data build lsun church_outdoor_train_lmdb.zip --out s3://bucket/church256
    """
    if kind is Kind.WEBDATASET:
        if source is None:
            raise UserError(
                "ddpm data build webdataset: name the folder or URL of the tars after `webdataset`"
            )
        given = {
            "--size": size is not None,
            "--channels": channels is not None,
            "--geometry": geometry is not None,
            "--labels": labels,
            "--start-over": start_over,
            "--encoding": encoding != "png",
            "--shard-bytes": shard_bytes != _SHARD_BYTES,
        }
        refused = next((option for option, is_given in given.items() if is_given), None)
        if refused is not None:
            raise UserError(f"{refused}: tars are indexed as they are; leave it out, or build kind tar")
        _adopt(source, out, val_fraction, max_rejected, name, workers, as_json)
        return
    from data_pipeline.build.plan import BuildOptions

    options = BuildOptions(
        size=size,
        geometry=geometry,
        encoding=Encoding.parse(encoding),
        channels=channels,
        val_fraction=val_fraction,
        shard_bytes=shard_bytes,
        max_rejected=max_rejected,
        name=name,
    )
    path = None if source is None else Path(source)
    opened = open_source(kind, path, labels=labels, size=size)
    try:
        _build(opened, out, options, workers, start_over, as_json)
    finally:
        opened.close()


def _build(
    source: "Source", out: str, options: "BuildOptions", workers: int | None, start_over: bool, as_json: bool
) -> None:
    from data_pipeline import build as building
    from data_pipeline.inspect import summarise

    if workers is None:
        workers = building.default_workers(source)
    found = building.find_built(source, out, options, workers=workers)
    if found is None:
        try:
            building.build(source, out, options, workers=workers, start_over=start_over)
        except KeyboardInterrupt:
            typer.echo("interrupted: the same command goes on from here", err=True)
            raise
    report = summarise(out, already_built=found is not None, ignored=source.ignored)
    _print_built(report, as_json)


def _print_built(report: "BuildReport", as_json: bool) -> None:
    from data_pipeline.build import REJECTED_FILE
    from data_pipeline.build.duplicates import DUPLICATES_FILE

    kept = f", {report.kept} with the source's own bytes" if report.kept else ""
    lines = [
        f"{report.url}: {'already built' if report.already_built else 'built'}, "
        f"{report.samples['train']} train and {report.samples['val']} val pictures of "
        f"{report.size} x {report.size} x {report.channels} in {report.shards} shards{kept}",
        f"index.json sha256 {report.index_sha256}",
    ]
    if report.rejected:
        lines.append(f"{report.rejected} unreadable, see {report.url}/{REJECTED_FILE}")
    if report.duplicates:
        lines.append(f"{report.duplicates} equal to an earlier one, see {report.url}/{DUPLICATES_FILE}")
    if report.ignored:
        lines.append(f"{report.ignored} other files in the source are no pictures and were left out")
    _print(report, as_json, lines)


@app.command()
def index(
    url: Annotated[str, typer.Argument(metavar="URL", help="Folder or fsspec URL with WebDataset tars.")],
    val_fraction: Annotated[
        float | None,
        typer.Option(
            help="Least share kept for validation, in whole tars. Default: 0.05.", show_default=False
        ),
    ] = None,
    max_rejected: MaxRejected = 0.001,
    name: Annotated[str | None, typer.Option(help="Name of the data set. Default: the folder's.")] = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Index WebDataset tars where they lie: records beside each tar, index.json last; no tar is changed.

    Tars with val, valid, validation or test in their names are the validation split; if there are none, whole
    tars are chosen by content hash until they hold --val-fraction of the pictures.

    Example: ddpm data index s3://bucket/imagenet64-tars
    """
    _adopt(url, url, val_fraction, max_rejected, name, workers, as_json)


def _adopt(
    source: str,
    out: str,
    val_fraction: float | None,
    max_rejected: float,
    name: str | None,
    workers: int | None,
    as_json: bool,
) -> None:
    from data_pipeline.index import INDEX_FILE
    from data_pipeline.inspect import summarise
    from data_pipeline.storage import Storage
    from data_pipeline.tars.adopt import AdoptOptions, adopt

    options = AdoptOptions(max_rejected=max_rejected, name=name)
    if val_fraction is not None:
        options = replace(options, val_fraction=val_fraction)
    already_built = Storage(out).exists(INDEX_FILE)
    adopt(source, out, options, workers=workers or os.cpu_count() or 1)
    _print_built(summarise(out, already_built=already_built, ignored=0), as_json)


@app.command()
def verify(url: DataUrl, workers: Workers = None, as_json: AsJson = False) -> None:
    """Read every byte and check sizes, SHA-256, CRC32C, that tar and records agree and every picture decodes.

    Exit 0 if all is sound, 1 if not (every problem is listed with its shard and member).
    """
    from data_pipeline.index import load_index
    from data_pipeline.verify import verify as verify_all

    report = verify_all(load_index(url), workers=workers or os.cpu_count() or 1)
    verdict = "sound" if not report.problems else f"{len(report.problems)} problem(s)"
    lines = [
        *report.problems,
        *(f"note: {note}" for note in report.notes),
        f"{report.url}: {report.samples} pictures in {report.shards} shards: {verdict}",
    ]
    _print(report, as_json, lines)
    if report.problems:
        raise typer.Exit(ExitCode.FAILED)


@app.command()
def stats(
    url: DataUrl,
    limit: Annotated[int, typer.Option(min=1, help="Pictures per split that are looked at.")] = 10_000,
    as_json: AsJson = False,
) -> None:
    """Show what a data set holds: splits, shards, bytes, mean and deviation per channel, classes."""
    from data_pipeline import inspect
    from data_pipeline.index import load_index

    report = inspect.stats(load_index(url), limit=limit)
    lines = [
        f"{report.name} ({report.kind}): {report.size} x {report.size} x {report.channels}, geometry "
        f"{report.geometry}, encoding {report.encoding}, {report.kept} with the source's own bytes, "
        f"{report.rejected} rejected, {report.duplicates} duplicates"
    ]
    for split, found in report.splits.items():
        mean, std = (" ".join(f"{v:.2f}" for v in values) for values in (found.mean, found.std))
        lines.append(f"{split:5} {found.samples} pictures, {found.shards} shards, {found.bytes / 1e6:.1f} MB")
        lines.append(
            f"      of the first {found.pixels_of}: {found.picture_bytes / 1e3:.1f} kB each, "
            f"mean {mean}, std {std} (of 255)"
        )
        if found.labels:
            shares = ", ".join(f"{name} {count}" for name, count in found.labels.items())
            lines.append(f"      {found.labelled} labelled: {shares}")
    lines.append(f"index.json sha256 {report.index_sha256}")
    _print(report, as_json, lines)


@app.command()
def preview(
    url: DataUrl,
    out: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("preview.png"),
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=4096, help="Number of pictures.")] = 64,
    split: Split = "train",
    seed: Seed = 0,
    start: Start = 0,
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
        position=start,
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
    start: Start = 0,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Number of positions.")] = 20,
    keys: Annotated[
        bool, typer.Option("--keys", help="Also read the pictures' keys from the shards.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show which picture stands at which position of the training stream; reads index.json only.

    Example: ddpm data order s3://bucket/church256 --seed 1 --start 1000000 --count 64 --json
    """
    from data_pipeline import inspect
    from data_pipeline.index import load_index

    report = inspect.order_of(
        load_index(url),
        split=split,
        seed=seed,
        window_shards=window_shards,
        start=start,
        count=count,
        with_keys=keys,
    )
    lines = [
        f"{row.position:>12} {row.epoch:>6} {row.shard} {row.member:>7} {row.key or ''}".rstrip()
        for row in report.rows
    ]
    heading = f"{'position':>12} {'epoch':>6} {'shard':<16} {'member':>7}{' key' if keys else ''}"
    _print(report, as_json, [heading, *lines])


def _print(report: "Document", as_json: bool, lines: list[str]) -> None:
    typer.echo(report.to_json().decode().rstrip() if as_json else "\n".join(lines))
