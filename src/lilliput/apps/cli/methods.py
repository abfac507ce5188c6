"""`lilliput methods`: what a recipe may name."""

import dataclasses
import inspect
from typing import Any

import click

from lilliput.apps.cli.options import common
from lilliput.apps.cli.output import Output, pairs


@common
@click.command("methods")
@click.argument("name", required=False)
@click.pass_obj
def command(out: Output, name: str | None) -> None:
    """List the methods, or show the options of the one called NAME (needs lilliput[compress]).

    \b
    JSON of the list:  {"methods": {name: "module:Class"}}
    JSON of one:       {"name", "summary", "needs", "options": {option: default}}
    """
    from lilliput.methods import METHODS

    if name is None:
        out.result({"methods": dict(METHODS)}, lambda: pairs(dict(METHODS)))
        return
    method = METHODS.load(name)
    options = {f.name: _default(f) for f in dataclasses.fields(method)}
    summary = inspect.getdoc(method) or ""
    needs = getattr(method, "needs", None)
    document = {"name": name, "summary": summary, "needs": getattr(needs, "value", None), "options": options}
    out.result(document, lambda: f"{summary}\n\n{pairs(options)}")


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else None
