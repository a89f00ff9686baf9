"""`ddpm`: one program over documented functions. The commands import what they need when they run."""

import logging
import sys

import typer

from launch.commands import checkpoints, data, doctor, recipe, sample, weights
from launch.commands import eval as evaluation
from trainer.command import report_errors, train

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="ddpm-foundry: pictures to shards to a trained and scored DDPM (Ho et al. 2020).",
)
app.add_typer(data.app, name="data")
app.add_typer(recipe.app, name="recipe")
app.command("train")(train)
app.add_typer(checkpoints.app, name="checkpoints")
app.add_typer(weights.app, name="weights")
app.add_typer(evaluation.app, name="eval")
app.command("sample")(sample.sample)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Entry point of `ddpm`; a user's mistake ends in one line and exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    report_errors(app)


if __name__ == "__main__":
    main()
