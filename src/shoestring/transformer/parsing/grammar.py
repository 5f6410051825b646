"""Trees of a small English grammar, for training and testing where a treebank's licence does not allow it.

It has what makes parsing more than tagging: recursion, relative clauses, coordination, and attachment that the
preposition and the verb decide. It is far simpler than newspaper text, and scores on it say nothing about any treebank.
"""

import random

from shoestring.transformer.parsing.trees import Tree

__all__ = ["random_tree"]

_WORDS = {
    tag: tuple(words.split())
    for tag, words in {
        "DT": "the a this every some no",
        "JJ": "old small red quiet clever heavy empty bright narrow strange",
        "NN": "dog teacher house letter river garden child engine book bird city doctor window boat farmer",
        "NNP": "Anna Berlin Omar Lisbon Clara Kofi",
        "VBD": "saw found painted carried followed opened bought liked watched remembered",
        "VBI": "slept arrived laughed waited fell sang",
        "VBS": "said thought knew believed hoped",
        "IN-N": "of without",
        "IN-V": "during after before",
        "IN": "in near with behind",
        "WP": "who that",
        "RB": "slowly often never quickly soon",
        "CC": "and or but",
    }.items()
}
_DEEPEST = 5


def random_tree(draw: random.Random) -> Tree:
    """A sentence's tree."""
    children = [_clause(draw, 0)]
    if draw.random() < 0.15:
        children += [_leaf(draw, "CC"), _clause(draw, 1)]
        return Tree("S", [*children, Tree(".", word=".")])
    return Tree("S", [*children[0].children, Tree(".", word=".")])


def _leaf(draw: random.Random, kind: str) -> Tree:
    tag = {"VBI": "VBD", "VBS": "VBD", "IN-N": "IN", "IN-V": "IN"}.get(kind, kind)
    return Tree(tag, word=draw.choice(_WORDS[kind]))


def _clause(draw: random.Random, depth: int) -> Tree:
    return Tree("S", [_noun_phrase(draw, depth + 1), _verb_phrase(draw, depth + 1)])


def _noun_phrase(draw: random.Random, depth: int) -> Tree:
    if draw.random() < 0.2:
        return Tree("NP", [_leaf(draw, "NNP")])
    core = [
        _leaf(draw, "DT"),
        *(_leaf(draw, "JJ") for _ in range(draw.choice((0, 0, 1, 2)))),
        _leaf(draw, "NN"),
    ]
    phrase = Tree("NP", core)
    if depth >= _DEEPEST:
        return phrase
    chance = draw.random()
    if chance < 0.15:
        return Tree("NP", [phrase, Tree("PP", [_leaf(draw, "IN-N"), _noun_phrase(draw, depth + 1)])])
    if chance < 0.27:
        who = Tree("WHNP", [_leaf(draw, "WP")])
        return Tree("NP", [phrase, Tree("SBAR", [who, Tree("S", [_verb_phrase(draw, depth + 1)])])])
    if chance < 0.35:
        return Tree("NP", [phrase, _leaf(draw, "CC"), _noun_phrase(draw, _DEEPEST)])
    return phrase


def _verb_phrase(draw: random.Random, depth: int) -> Tree:
    chance = draw.random()
    if chance < 0.2 and depth < _DEEPEST:
        return Tree("VP", [_leaf(draw, "VBS"), Tree("SBAR", [_clause(draw, depth + 1)])])
    parts = [_leaf(draw, "VBI")] if chance < 0.4 else [_leaf(draw, "VBD"), _noun_phrase(draw, depth + 1)]
    if draw.random() < 0.3 and depth < _DEEPEST:
        # `in` and its like belong to the verb in this grammar, `of` to the noun.
        parts.append(Tree("PP", [_leaf(draw, draw.choice(("IN", "IN-V"))), _noun_phrase(draw, _DEEPEST)]))
    if draw.random() < 0.2:
        parts.append(Tree("ADVP", [_leaf(draw, "RB")]))
    return Tree("VP", parts)
