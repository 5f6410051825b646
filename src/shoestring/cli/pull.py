"""`shoestring pull`: fetch and verify a model."""

from typing import Annotated

import typer

from shoestring.cli import options as opt
from shoestring.cli.terminal import note, output, print_json, progress
from shoestring.units import format_bytes

__all__ = ["pull"]


def pull(
    name: Annotated[str, typer.Argument(help="A bundled name or a hub id.", show_default=False)],
    revision: opt.Revision = None,
    dtype: opt.Dtype = "auto",
    json: opt.Json = False,
) -> None:
    """Fetch a model, verify it and make it ready to load.

    Example: shoestring pull smollm2-135m
    """
    from shoestring import hub

    missing = next((m for m in hub.list_models() if m.name == name and not m.local), None)
    if missing is not None:
        note(f"{name} is a download of {format_bytes(missing.size_bytes)} (once)")
    with progress() as report:
        # A bundled model runs as it was published, unless another dtype is asked for.
        as_published = hub.find_gguf(name, report) if name in hub.BUNDLED and dtype == "auto" else None
        path = as_published or hub.resolve(name, revision=revision, dtype=dtype, progress=report)
    size = hub.folder_bytes(path)
    if json:
        print_json({"name": name, "path": str(path), "bytes": size})
    else:
        output().print(f"{name} is ready: {path} ({format_bytes(size)})", markup=False)
