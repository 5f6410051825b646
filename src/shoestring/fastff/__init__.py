"""Fast feedforward layers (arXiv 2308.14711, 2311.10770): a token uses one path of each binary tree of neurons."""

from shoestring.fastff.layer import FastFeedForward
from shoestring.fastff.leaves import FFF, hardening_loss
from shoestring.fastff.native import FastFeedForwardStack
from shoestring.fastff.statistics import Load, load_of

__all__ = ["FFF", "FastFeedForward", "FastFeedForwardStack", "Load", "hardening_loss", "load_of"]
