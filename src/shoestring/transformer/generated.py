"""Pairs made up by rule, pair n always the same: copying, reversing, and trees of a small grammar."""

import random
from collections.abc import Callable, Mapping

from shoestring.transformer.parsing.grammar import random_tree
from shoestring.transformer.parsing.trees import leaves, linearized

__all__ = ["GENERATORS"]

_SYMBOLS = "abcdefghijklmnopqrstuvwxyz"


def _letters(kind: str, index: int) -> list[str]:
    draw = random.Random(f"{kind}/{index}")
    return [draw.choice(_SYMBOLS) for _ in range(draw.randint(3, 12))]


def _copy(index: int) -> tuple[str, str]:
    letters = " ".join(_letters("copy", index))
    return letters, letters


def _reverse(index: int) -> tuple[str, str]:
    letters = _letters("reverse", index)
    return " ".join(letters), " ".join(reversed(letters))


def _trees(index: int) -> tuple[str, str]:
    tree = random_tree(random.Random(f"trees/{index}"))
    return " ".join(leaves(tree)), linearized(tree)


GENERATORS: Mapping[str, Callable[[int], tuple[str, str]]] = {
    "copy": _copy,
    "reverse": _reverse,
    "trees": _trees,
}
