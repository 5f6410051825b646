"""Drafters: they propose branches below the last token and observe what became of them."""

from shoestring.decoding.drafters.protocol import Context, Draft, Drafter, StepObservation

__all__ = ["Context", "Draft", "Drafter", "StepObservation"]
