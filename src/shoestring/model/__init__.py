"""`load` a model; `generate`, `stream` and `score` with it, whatever strategy decodes and whatever body runs it."""

from shoestring.model.language_model import LanguageModel
from shoestring.model.loading import load
from shoestring.model.quantizing import Quantized, quantize_model

__all__ = ["LanguageModel", "Quantized", "load", "quantize_model"]
