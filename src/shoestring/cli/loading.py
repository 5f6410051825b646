"""Loading a model for a command: options in, a `LanguageModel` out, progress on stderr meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from shoestring.cli.terminal import note, progress

if TYPE_CHECKING:
    from shoestring.model import LanguageModel
    from shoestring.transformer.search import SearchOptions
    from shoestring.transformer.translator import Translator

__all__ = ["loaded", "loaded_translator"]


@contextmanager
def loaded(
    model: str,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    look_ahead: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    decoding: tuple[str, ...] = (),
    batch: int = 0,
) -> Iterator["LanguageModel"]:
    """Load the model; the progress bar is gone before the command prints.

    Args:
        decoding: strategies that will be used, so that the machine is timed for them now, under the bar.
        batch: how many sequences will be decoded at once, so that their steps are compiled now; 0: when they come.
    """
    from shoestring.decoding.settings import Auto, as_decoding, needs_step_cost

    settings = [as_decoding(name) for name in decoding]  # a wrong name is said before anything is fetched
    with progress() as report:
        report("load", 0, None)
        from shoestring.model import load

        language_model = load(
            model,
            revision=revision,
            adapter=adapter,
            look_ahead=look_ahead,
            device=device,
            dtype=dtype,
            quantize=quantize,
            progress=report,
        )
        if any(needs_step_cost(setting) for setting in settings):
            language_model.step_cost()
        if any(
            isinstance(setting, Auto) and setting.drafts(language_model.step_cost) for setting in settings
        ):
            language_model.successors()
            language_model.datastore()
        if batch:
            language_model.warm_up(batch)
    note(language_model.description)
    yield language_model


def loaded_translator(
    model: str, device: str, dtype: str, beam: int, length_penalty: float, extra_length: int
) -> "tuple[Translator, SearchOptions]":
    """A trained Transformer, and how it is to search."""
    import torch

    from shoestring.errors import RequestError, suggest
    from shoestring.training.trainer import resolved_device
    from shoestring.transformer.search import SearchOptions
    from shoestring.transformer.translator import Translator

    kinds = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise RequestError(f"unknown dtype {dtype!r}{suggest(dtype, kinds)}; known: {', '.join(kinds)}")
    translator = Translator.load(model, resolved_device(device), kinds[dtype])
    return translator, SearchOptions(beam, length_penalty, extra_length)
