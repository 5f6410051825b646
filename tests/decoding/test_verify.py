from hypothesis import given
from hypothesis import strategies as st

from shoestring.decoding.verify import verify
from shoestring.engine.tokentree import TokenTree


class Rows:
    """Rows whose next tokens are given."""

    def __init__(self, following, wanted=None):
        self.following, self.wanted = following, range(len(following)) if wanted is None else wanted

    def has(self, row):
        return row in self.wanted

    def next_token(self, row):
        assert self.has(row), "a row that was not asked for was read"
        return self.following[row]


@st.composite
def tries(draw):
    """A tree whose siblings are unique, each row's next token, and the rows whose outputs are there."""
    tokens, parents = [7], [-1]
    for _ in range(draw(st.integers(0, 14))):
        parent, token = draw(st.integers(0, len(tokens) - 1)), draw(st.integers(0, 2))
        if (parent, token) not in set(zip(parents, tokens, strict=True)):
            tokens.append(token)
            parents.append(parent)
    following = draw(st.lists(st.integers(0, 2), min_size=len(tokens), max_size=len(tokens)))
    wanted = {0} | set(draw(st.lists(st.integers(0, len(tokens) - 1))))
    return TokenTree(tokens, parents), following, wanted


@given(tries())
def test_the_walk_is_the_longest_branch_that_the_next_tokens_agree_with(case):
    tree, following, wanted = case
    path, emitted = verify(tree, Rows(following, wanted))
    assert emitted == [following[row] for row in path]
    assert path == tree.path(path[-1])
    assert [tree.tokens[row] for row in path[1:]] == emitted[:-1]
    onward = [child for child in tree.children[path[-1]] if tree.tokens[child] == emitted[-1]]
    assert not [child for child in onward if child in wanted]


def test_the_walk_begins_below_a_prompt():
    tree = TokenTree([5, 6, 7, 8, 9], [-1, 0, 1, 2, 2])
    assert verify(tree, Rows([0, 0, 9, 0, 4]), root=2) == ([2, 4], [9, 4])


def test_a_row_without_outputs_is_not_walked_through():
    tree = TokenTree.chain([5, 6, 7])
    assert verify(tree, Rows([6, 7, 8])) == ([0, 1, 2], [6, 7, 8])
    assert verify(tree, Rows([6, 7, 8], wanted={0, 2})) == ([0], [6])
    assert verify(tree, Rows([6, 7, 8]), read_only={2}) == ([0, 1], [6, 7])
