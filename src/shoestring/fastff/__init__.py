"""Fast feedforward layers (arXiv 2308.14711, 2311.10770): a token uses one path of each binary tree of neurons."""

from shoestring.fastff.layer import FastFeedForward

__all__ = ["FastFeedForward"]
