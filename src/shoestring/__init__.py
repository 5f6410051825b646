"""Run, train and trust open language models on a shoestring."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoestring.decoding.drafters import Context, Draft, Drafter, StepObservation
    from shoestring.decoding.settings import Auto, Autoregressive, DraftModel, Lookahead, Ngram
    from shoestring.errors import ShoestringError
    from shoestring.generation import Generation, Piece, Score
    from shoestring.inside_transformers import custom_generate
    from shoestring.model import LanguageModel, load, quantize_model

__all__ = [
    "Auto",
    "Autoregressive",
    "Context",
    "Draft",
    "DraftModel",
    "Drafter",
    "Generation",
    "LanguageModel",
    "Lookahead",
    "Ngram",
    "Piece",
    "Score",
    "ShoestringError",
    "StepObservation",
    "custom_generate",
    "load",
    "quantize_model",
]
__version__ = "0.1.0"

_HOMES = {
    "shoestring.decoding.drafters": ("Context", "Draft", "Drafter", "StepObservation"),
    "shoestring.decoding.settings": ("Auto", "Autoregressive", "DraftModel", "Lookahead", "Ngram"),
    "shoestring.errors": ("ShoestringError",),
    "shoestring.inside_transformers": ("custom_generate",),
    "shoestring.generation": ("Generation", "Piece", "Score"),
    "shoestring.model": ("LanguageModel", "load", "quantize_model"),
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `import shoestring` costs milliseconds: torch and transformers come with the first use.
    import importlib

    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(home), name)
    if not name.startswith("_"):
        try:
            return importlib.import_module(f"shoestring.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"shoestring.{name}":
                raise
    raise AttributeError(f"module 'shoestring' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
