"""`ddpm recipe`: the shipped experiments."""

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Show the shipped recipes and what overrides make of them.")


@app.command("list")
def list_recipes() -> None:
    """List the shipped recipes with their first line."""
    from trainer.recipe import recipe_names, recipe_text

    for name in recipe_names():
        headline, _, _ = recipe_text(name).splitlines()[0].lstrip("# ").partition(" Sources:")
        print(f"{name:20} {headline}")


@app.command("show")
def show(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe or a .yaml file.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    resolved: Annotated[bool, typer.Option(help="All fields with defaults, instead of the source.")] = False,
) -> None:
    """Print a recipe: its source with comments, or every field resolved (--resolved, or with overrides)."""
    from trainer.recipe import load_recipe, recipe_text

    checked = load_recipe(recipe, overrides or [])
    print(checked.to_yaml() if resolved or overrides else recipe_text(recipe), end="")
