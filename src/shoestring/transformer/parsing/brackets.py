"""Labelled bracket precision, recall and F1 (PARSEVAL), over a whole test set."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from shoestring.transformer.parsing.trees import Tree, leaves

__all__ = ["BracketScore", "bracket_score"]


@dataclass(frozen=True)
class BracketScore:
    """Percentages; `exact` is the share of trees whose brackets are all right and none too many."""

    precision: float
    recall: float
    f1: float
    exact: float
    trees: int


def bracket_score(trees: Sequence[Tree], references: Sequence[Tree]) -> BracketScore:
    """Brackets are (label, first word, last word) of constituents; tags of words do not count."""
    matched = found = wanted = exact = 0
    for tree, reference in zip(trees, references, strict=True):
        assert len(leaves(tree)) == len(leaves(reference)), "a parse is over its sentence's words"
        ours, theirs = _brackets(tree), _brackets(reference)
        matched += (ours & theirs).total()
        found += ours.total()
        wanted += theirs.total()
        exact += ours == theirs
    precision, recall = matched / max(1, found), matched / max(1, wanted)
    f1 = 2 * precision * recall / max(1e-12, precision + recall)
    return BracketScore(100 * precision, 100 * recall, 100 * f1, 100 * exact / max(1, len(trees)), len(trees))


def _brackets(tree: Tree) -> Counter[tuple[str, int, int]]:
    found: Counter[tuple[str, int, int]] = Counter()

    def walk(node: Tree, start: int) -> int:
        if node.word is not None:
            return start + 1
        end = start
        for child in node.children:
            end = walk(child, end)
        found[node.label, start, end] += 1
        return end

    walk(tree, 0)
    return found
