import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoestring.engine.tokentree import NO_TOKEN, TokenTree
from shoestring.errors import RequestError


@st.composite
def parents(draw, most=24):
    count = draw(st.integers(1, most))
    return [-1, *(draw(st.integers(0, row - 1)) for row in range(1, count))]


def ancestors(parents, row):
    """The row and its ancestors, by the definition."""
    found = {row}
    while parents[row] != -1:
        row = parents[row]
        found.add(row)
    return found


@given(parents())
def test_depths_paths_children_and_mask_follow_from_the_parents(parents):
    tree = TokenTree(list(range(len(parents))), parents)
    mask = tree.ancestor_mask()
    assert mask.dtype == torch.bool
    for row in range(len(parents)):
        expected = ancestors(parents, row)
        assert tree.depths[row] == len(expected) - 1
        assert set(tree.path(row)) == expected
        assert tree.path(row)[0] == 0
        assert tree.path(row)[-1] == row
        assert set(mask[row].nonzero().flatten().tolist()) == expected
        assert tree.children[row] == [child for child in range(len(parents)) if parents[child] == row]
    assert tree.is_chain == all(len(children) <= 1 for children in tree.children)


@given(st.integers(1, 40))
def test_a_chain_is_causal(count):
    tree = TokenTree.chain([5] * count)
    assert tree.is_chain
    assert list(tree.depths) == list(range(count))
    assert torch.equal(tree.ancestor_mask(), torch.ones(count, count).tril().bool())


@pytest.mark.parametrize(
    ("tokens", "parents"),
    [([], []), ([1], [0]), ([1, 2], [-1]), ([1, 2], [-1, 1]), ([1, 2], [-1, -1]), ([1, 2, 3], [-1, 2, 0])],
)
def test_impossible_trees_are_refused(tokens, parents):
    with pytest.raises(RequestError):
        TokenTree(tokens, parents)


def test_a_row_needs_a_token_or_an_embedding():
    with pytest.raises(RequestError, match="row 1 has token -1 and no embedding"):
        TokenTree([3, NO_TOKEN], [-1, 0])
    assert len(TokenTree([3, NO_TOKEN], [-1, 0], embeddings={1: torch.zeros(4)})) == 2
