"""Walk a token tree by each row's next token: the accepted path and the tokens it emits."""

from collections.abc import Collection

from shoestring.engine.runner import RowResults
from shoestring.engine.tokentree import NativeTree, TokenTree

__all__ = ["verify"]


def verify(
    tree: TokenTree, results: RowResults, root: int = 0, read_only: Collection[int] = ()
) -> tuple[list[int], list[int]]:
    """From row `root`, move to the child that carries the row's next token, as long as there is one.

    Rows in `read_only` are never moved to. Returns the rows walked, `root` first, and one emitted token per row:
    the last one is not in the tree and starts the next step. Greedy and sampled alike: a row's next token does not
    depend on the step it is in, so the tokens are those of plain decoding.
    """
    if isinstance(tree, NativeTree) and root == 0 and not read_only:
        drawn = results.drawn()
        if drawn is not None:
            walked: tuple[list[int], list[int]] = tree.draft.walk(drawn)
            if walked[1][-1] >= 0:  # else the row's logits were no numbers, which asking for its token tells
                return walked
    path, emitted = [root], [results.next_token(root)]
    tokens, parents = tree.tokens, tree.parents
    row, token = root, emitted[0]
    # A child comes after its parent, and siblings are unique: one look at each row is enough.
    for child in range(root + 1, len(tree)):
        # A row without outputs can't be walked through.
        if parents[child] == row and tokens[child] == token and child not in read_only and results.has(child):
            row, token = child, results.next_token(child)
            path.append(child)
            emitted.append(token)
    return path, emitted
