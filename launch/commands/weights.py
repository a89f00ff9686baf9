"""`ddpm weights`: weights out to diffusers, in from other code bases, and averages chosen after training."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer

app = typer.Typer(no_args_is_help=True, help="Bring weights out and in, and choose averages.")
AsJson = Annotated[bool, typer.Option("--json", help="Print the facts as JSON instead of a line.")]


class Target(StrEnum):
    """What weights can be exported to."""

    DIFFUSERS = "diffusers"


OPENED_WITH: Final = {Target.DIFFUSERS: "DDPMPipeline.from_pretrained"}


@app.command("export")
def export(
    place: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_CHECKPOINT",
            help="The run directory (a folder or URL), RUN/checkpoints/NAME for one of its checkpoints, or a "
            "folder that `ddpm weights ema` has made.",
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder to write: a new or an empty one.")
    ],
    target: Annotated[Target, typer.Option("--to", help="Whose format.")] = Target.DIFFUSERS,
    checkpoint: Annotated[str | None, typer.Option(help="Its name. Default: the newest live one.")] = None,
    ema: Annotated[
        str | None,
        typer.Option(
            help="EMA profile, raw, or std0.0500 and its like of `ddpm weights ema`. Default: that of the "
            "first evaluation spec."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as a folder that diffusers' DDPMPipeline.from_pretrained(DIR) samples from."""
    from data_pipeline.errors import UserError
    from data_pipeline.storage import Storage
    from trainer.run import Run
    from trainer.weights.export import export_diffusers, export_reconstruction, split_place
    from trainer.weights.posthoc import open_reconstruction

    made = open_reconstruction(Storage(place))
    if made is not None:
        if (checkpoint, ema) != (None, None):
            raise UserError(f"{place}: is one average; leave out --checkpoint and --ema")
        facts = export_reconstruction(made, folder)
    else:
        run_url, named = split_place(place)
        if named and checkpoint not in (None, named):
            raise UserError(f"--checkpoint {checkpoint}: {place} names another one; give it once")
        facts = export_diffusers(Run(run_url), folder, checkpoint=named or checkpoint, ema=ema)
    if as_json:
        print(facts.to_json().decode(), end="")
    else:
        print(f"{folder}: {facts.checkpoint}, {facts.ema}; {OPENED_WITH[target]} opens it")


@app.command("import")
def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="A local file (.safetensors, .pt, .pth, .bin, .ckpt, .npz) or a diffusers DDPM folder."
        ),
    ],
    recipe: Annotated[
        str,
        typer.Option(help="A shipped recipe (`ddpm recipe list`) or a .yaml file: what the weights are of."),
    ],
    run_url: Annotated[str, typer.Option("--run", metavar="RUN", help="The new run: a folder or URL.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the recipe's, e.g. model.dropout=0."),
    ] = None,
    images: Annotated[
        int,
        typer.Option(
            min=0,
            max=10**10 - 1,
            help="Training images the weights count as having seen: where the clock starts.",
        ),
    ] = 0,
    new_attention_order: Annotated[
        bool,
        typer.Option(
            "--new-attention-order",
            help="Of OpenAI's weights trained with use_new_attention_order, which the file does not tell.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Publish weights of diffusers, pesser, OpenAI or the paper's TensorFlow code as the start of a new RUN.

    The format is detected. Nothing in SOURCE is run: what would need unpickling is refused.
    """
    from trainer.recipe import load_recipe
    from trainer.run import Run
    from trainer.weights.imports import ImportOptions, import_weights

    loaded = load_recipe(recipe, [*(overrides or []), f"run={run_url}"])
    options = ImportOptions(images, new_attention_order)
    facts = import_weights(source, loaded, Run(run_url), options)
    if as_json:
        print(facts.to_json().decode(), end="")
        return
    averages = (
        "averages of its own" if facts.averages else "no averages: every EMA profile starts as the weights"
    )
    settings = [*([] if loaded.data.url else ["data.url=SHARDS"]), *(overrides or [])]
    print(f"{facts.run}: {facts.checkpoint}, {facts.tensors} tensors of {facts.format}, {averages}")
    print(f"sample:   ddpm sample {run_url} --out samples")
    print(f"continue: ddpm train {recipe} run={run_url} {' '.join(settings)}".rstrip())


@app.command("ema")
def ema_(
    run_url: Annotated[str, typer.Argument(metavar="RUN", help="The run directory: a folder or URL.")],
    std: Annotated[
        float,
        typer.Option(help="Relative standard deviation: the average's width as a share of the training."),
    ],
    at: Annotated[
        int | None, typer.Option(min=1, help="Images of one of its snapshots. Default: the newest one's.")
    ] = None,
    snapshots: Annotated[
        int | None, typer.Option(min=1, help="Use the last so many snapshots up to there. Default: all.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Folder or URL. Default: RUN/ema/CHECKPOINT-stdSTD, found by --ema stdSTD."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make the power-function average of any width from RUN's snapshots (Karras et al. 2024).

    RUN keeps snapshots if its recipe has averages of that kind, e.g. ema.short.std=0.05 ema.long.std=0.1.
    """
    import json

    from trainer.run import Run
    from trainer.weights.posthoc import PosthocOptions, reconstruct

    run = Run(run_url)
    place, facts = reconstruct(run, PosthocOptions(std, at, snapshots, out))
    if as_json:
        print(json.dumps({"folder": place, **json.loads(facts.to_json())}, indent=2))
        return
    print(
        f"{place}: std {facts.std:g} at {facts.images} images, of {len(facts.sources)} of {facts.offered} "
        f"stored averages, residual {facts.residual:.2g}"
    )
    if out is None and facts.checkpoint in run.live_checkpoints():
        print(
            f"sample: ddpm sample {run_url} --checkpoint {facts.checkpoint} --ema {facts.ema} --out samples"
        )
    print(f"export: ddpm weights export {place} DIR")
