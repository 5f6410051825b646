"""Walk a token tree by each row's next token: the accepted path and the tokens it emits."""

from collections.abc import Collection

from shoestring.engine.runner import RowResults
from shoestring.engine.tokentree import TokenTree

__all__ = ["verify"]


def verify(
    tree: TokenTree, results: RowResults, root: int = 0, read_only: Collection[int] = ()
) -> tuple[list[int], list[int]]:
    """From row `root`, move to the child that carries the row's next token, as long as there is one.

    Rows in `read_only` are never moved to. Returns the rows walked, `root` first, and one emitted token per row:
    the last one is not in the tree and starts the next step. Greedy and sampled alike: a row's next token does not
    depend on the step it is in, so the tokens are those of plain decoding.
    """
    path, emitted = [root], []
    while True:
        row = path[-1]
        token = results.next_token(row)
        emitted.append(token)
        # Siblings are unique, so at most one child matches; a row without outputs can't be walked through.
        match = [
            child
            for child in tree.children[row]
            if tree.tokens[child] == token and results.has(child) and child not in read_only
        ]
        if not match:
            return path, emitted
        path.append(match[0])
