"""`shoestring models`: what is known by name and what lies on this machine."""

from typing import Annotated

import typer

from shoestring.cli import options as opt
from shoestring.cli.terminal import output, print_json
from shoestring.units import format_bytes

__all__ = ["models"]


def models(
    remove: Annotated[
        str | None, typer.Option(metavar="NAME", help="Delete what the cache holds of this model.")
    ] = None,
    json: opt.Json = False,
) -> None:
    """List the models that are known by name or lie on this machine, with their sizes.

    Example: shoestring models --remove smollm2-135m
    """
    from shoestring import hub

    if remove is not None:
        freed = hub.remove_model(remove)
        if json:
            print_json({"removed": remove, "bytes": freed})
        else:
            output().print(f"{remove}: {format_bytes(freed)} freed", markup=False)
        return
    found = hub.list_models()
    if json:
        rows = [
            {
                "name": m.name,
                "kind": m.kind,
                "local": m.local,
                "bytes": m.size_bytes,
                "path": m.path and str(m.path),
            }
            for m in found
        ]
        print_json({"cache": str(hub.cache_root()), "models": rows})
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("name", "kind", "size", "where"):
        table.add_column(column, justify="right" if column == "size" else "left", overflow="fold")
    for model in found:
        where = str(model.path) if model.local else f"not here: shoestring pull {model.name}"
        table.add_row(model.name, model.kind, format_bytes(model.size_bytes), where)
    output().print(table)
