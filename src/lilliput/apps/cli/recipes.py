"""`lilliput recipes`: the recipes we ship."""

import click

from lilliput.apps.cli.options import common
from lilliput.apps.cli.output import Output, pairs


@common
@click.group("recipes", invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """List the recipes, or show one as YAML.

    \b
    JSON of list:  {"recipes": {name: what it is for}}
    JSON of show:  {"name", "stages": [{method: {option: value}}]}
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_)


@common
@command.command("list")
@click.pass_obj
def list_(out: Output) -> None:
    """List the names that `compress --recipe` takes."""
    from lilliput.core.recipe import named

    out.result({"recipes": named()}, lambda: pairs(named()))


@common
@command.command("show")
@click.argument("name")
@click.pass_obj
def show(out: Output, name: str) -> None:
    """Show the recipe NAME, or the one in a YAML file, as it would be run."""
    from lilliput.core.recipe import load_recipe

    recipe = load_recipe(name)
    out.result({"name": name, "stages": recipe.data()}, recipe.text().rstrip())
