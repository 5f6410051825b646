"""`shoestring quantize`: a model's weights in int8 or int4, in a folder."""

from pathlib import Path
from typing import Annotated

import typer

from shoestring.cli import options as opt
from shoestring.cli.terminal import output, print_json, progress
from shoestring.errors import RequestError
from shoestring.units import format_bytes

__all__ = ["quantize"]


def quantize(
    model: Annotated[
        str,
        typer.Argument(
            help="A hub id, a folder of safetensors, a .gguf file, or a bundled name.", show_default=False
        ),
    ],
    output_folder: Annotated[
        Path, typer.Option("--output", "-o", help="The new folder.", show_default=False)
    ],
    quantize: Annotated[str, typer.Option(help="int8 or int4.")] = "int4",
    calibrate: Annotated[
        Path | None,
        typer.Option(help="A text file (.gz and .xz too): round by GPTQ, so that outputs stay on such text."),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens that GPTQ sees.", min=1)] = 128,
    revision: opt.Revision = None,
    device: Annotated[str, typer.Option(help="Where GPTQ computes: auto, cpu, cuda, cuda:N.")] = "auto",
    json: opt.Json = False,
) -> None:
    """Write a model's folder with int8 or int4 weights, which generate, chat and compare run.

    Example: shoestring quantize smollm2-135m --quantize int4 --calibrate notes.txt --output smollm2-int4
    """
    from shoestring.quantization.calibration import read_calibration_text

    text = None if calibrate is None else read_calibration_text(calibrate)
    if text is not None and not text.strip():
        raise RequestError(f"calibration text {calibrate} is empty")
    with progress() as report:
        report("load", 0, None)
        from shoestring.model import quantize_model

        done = quantize_model(
            model,
            output_folder,
            quantize,
            calibration=text,
            windows=windows,
            revision=revision,
            device=device,
            progress=report,
        )
    if json:
        print_json(
            {
                "folder": str(done.folder),
                "quantize": done.quantize,
                "method": done.method,
                "bytes": done.nbytes,
                "seconds": round(done.seconds, 3),
            }
        )
        return
    how = f"GPTQ on {calibrate}" if calibrate else "to the nearest"
    output().print(
        f"{done.folder}: {done.quantize}, {how}, {format_bytes(done.nbytes)}, {done.seconds:.0f} s",
        markup=False,
    )
