import torch
from hypothesis import given
from hypothesis import strategies as st

from shoestring.decoding.drafters.protocol import ROOT, Draft

branches = st.lists(st.lists(st.integers(0, 3), max_size=5), max_size=6)


def paths(draft):
    """Every node's tokens from the root."""
    found = {ROOT: ()}
    for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        found[node] = (*found[parent], token)
    del found[ROOT]
    return found


@given(branches)
def test_branches_merge_into_a_trie(branches):
    draft = Draft.of(branches)
    prefixes = {tuple(branch[:end]) for branch in branches for end in range(1, len(branch) + 1)}
    found = paths(draft)
    assert set(found.values()) == prefixes
    assert len(draft) == len(prefixes)
    assert all(draft.depth(node) == len(path) for node, path in found.items())


@given(branches, st.integers(0, 6), st.sets(st.integers(0, 20)))
def test_clipping_keeps_what_is_not_too_deep_with_all_that_belongs_to_it(branches, most, wanted):
    draft = Draft.of(branches)
    draft.top_k, draft.wanted = 3, {node for node in wanted if node < len(draft)}
    draft.read_only = {node for node in draft.wanted if node % 2}
    draft.owners = {node: [f"owner of {path}"] for node, path in paths(draft).items()}
    clipped = draft.clipped(most)
    assert clipped.top_k == 3
    kept = {path for path in paths(draft).values() if len(path) <= most}
    found = paths(clipped)
    assert set(found.values()) == kept
    assert {found[node] for node in clipped.wanted} == kept & {paths(draft)[node] for node in draft.wanted}
    read_only = {paths(draft)[node] for node in draft.read_only}
    assert {found[node] for node in clipped.read_only} == kept & read_only
    assert clipped.owners == {node: [f"owner of {path}"] for node, path in found.items()}


def test_clipping_keeps_embeddings():
    draft = Draft.of([[5, 6]])
    vectors = torch.eye(3)
    shallow = draft.add_embedding(vectors[0], draft.add(5))
    draft.add_embedding(vectors[1], shallow)
    clipped = draft.clipped(2)
    assert clipped.tokens == [5, 6, -1]
    assert list(clipped.embeddings) == [2]
    assert torch.equal(clipped.embeddings[2], vectors[0])
