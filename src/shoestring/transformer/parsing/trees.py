"""Trees and their two written forms: Penn brackets with words, and the linear form that the model writes.

`(S (NP (DT the) (NN dog)) (VP (VBD barked)))` is linearised as `(S (NP DT NN ) (VP VBD ) )`: words are left out, a tag
stands for each, and whatever the model writes is repaired to a tree over the sentence's own words.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from shoestring.errors import RequestError

__all__ = ["Tree", "bracketed", "leaves", "linearized", "read_tree", "repaired"]

_ROOT, _UNKNOWN_TAG = "S", "XX"


@dataclass
class Tree:
    """A node: a label over children, or a tag over one word."""

    label: str
    children: "list[Tree]" = field(default_factory=list)
    word: str | None = None


def leaves(tree: Tree) -> list[str]:
    """The words, in order."""
    if tree.word is not None:
        return [tree.word]
    return [word for child in tree.children for word in leaves(child)]


def bracketed(tree: Tree) -> str:
    """The Penn form, one line."""
    if tree.word is not None:
        return f"({tree.label} {tree.word})"
    return f"({tree.label} {' '.join(map(bracketed, tree.children))})"


def linearized(tree: Tree) -> str:
    """The form that the model learns to write."""
    if tree.word is not None:
        return tree.label
    return f"({tree.label} {' '.join(map(linearized, tree.children))} )"


def read_tree(text: str) -> Tree:
    """A tree in Penn brackets; an outer pair without a label is taken off.

    Raises:
        RequestError: brackets that do not match, or something that is no tree.
    """
    tokens = text.replace("(", " ( ").replace(")", " ) ").split()
    tree, end = _read(tokens, 0, text)
    if end != len(tokens):
        raise RequestError(f"{text[:60]!r}: there is more after the tree: {' '.join(tokens[end:])[:40]!r}")
    while not tree.label and len(tree.children) == 1:
        tree = tree.children[0]
    return tree


def repaired(written: str, words: Sequence[str]) -> Tree:
    """The tree over `words` that a written linear form means, whatever is wrong with it.

    Brackets that never close are closed at the end, closing ones too many are dropped, empty constituents too; missing
    tags become XX, and tags too many are left out.
    """
    root = Tree("")
    stack, left = [root], list(words)
    for token in written.replace(")", " ) ").split():
        if token == ")":
            if len(stack) > 1:
                stack.pop()
        elif token.startswith("("):
            node = Tree(token[1:] or _ROOT)
            stack[-1].children.append(node)
            stack.append(node)
        elif left:
            stack[-1].children.append(Tree(token, word=left.pop(0)))
    # Words that were given no tag belong to the sentence's outermost constituent.
    top = root.children[0] if root.children and root.children[0].word is None else root
    top.children += [Tree(_UNKNOWN_TAG, word=word) for word in left]
    _prune(root)
    if len(root.children) == 1 and root.children[0].word is None:
        return root.children[0]
    return Tree(_ROOT, root.children)


def _prune(tree: Tree) -> None:
    for child in tree.children:
        _prune(child)
    tree.children = [child for child in tree.children if child.word is not None or child.children]


def _read(tokens: list[str], at: int, text: str) -> tuple[Tree, int]:
    if at >= len(tokens) or tokens[at] != "(":
        raise RequestError(f"{text[:60]!r} is not a tree: a bracket should open at token {at + 1}")
    at += 1
    label = ""
    if at < len(tokens) and tokens[at] not in "()":
        label = tokens[at]
        at += 1
    tree = Tree(label)
    while at < len(tokens) and tokens[at] != ")":
        if tokens[at] == "(":
            child, at = _read(tokens, at, text)
            tree.children.append(child)
        elif tree.children or tree.word is not None:
            raise RequestError(f"{text[:60]!r}: {tokens[at]!r} stands beside other children of {label!r}")
        else:
            tree.word = tokens[at]
            at += 1
    if at >= len(tokens):
        raise RequestError(f"{text[:60]!r}: a bracket of {label!r} never closes")
    return tree, at + 1
