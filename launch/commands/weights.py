"""`ddpm weights`: weights out to diffusers, and in from other code bases."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final

import typer

app = typer.Typer(no_args_is_help=True, help="Bring weights to diffusers, and from other code bases.")
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
            help="The run directory (a folder or URL), or RUN/checkpoints/NAME for one of its checkpoints.",
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder to write: a new or an empty one.")
    ],
    target: Annotated[Target, typer.Option("--to", help="Whose format.")] = Target.DIFFUSERS,
    checkpoint: Annotated[str | None, typer.Option(help="Its name. Default: the newest live one.")] = None,
    ema: Annotated[
        str | None, typer.Option(help="EMA profile, or raw. Default: that of the first evaluation spec.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint as a folder that diffusers' DDPMPipeline.from_pretrained(DIR) samples from."""
    from data_pipeline.errors import UserError
    from trainer.run import Run
    from trainer.weights.export import export_diffusers, split_place

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
