"""Embeddings that rows bring lie on the device once, and a step's layout says where."""

import torch

from shoestring.engine.cuda.layout import Bucket, DeviceLayout, HostLayout
from shoestring.engine.cuda.own_rows import OwnRows
from shoestring.engine.tokentree import NO_TOKEN, TokenTree


def tree_with(vectors):
    """A token, and a row for each vector behind it."""
    count = len(vectors)
    return TokenTree(
        [3, *[NO_TOKEN] * count], range(-1, count), {1 + row: v for row, v in enumerate(vectors)}
    )


def placed(rows, buffer, trees):
    """What the buffer holds where the trees' embeddings were placed, by slot."""
    return {slot: buffer[places] for slot, places in rows.place(trees).items()}


def test_vectors_are_copied_once_and_shared_by_slots():
    buffer = torch.zeros(8, 4)
    rows, vectors = OwnRows(buffer), torch.randn(3, 4).unbind()
    first = rows.place({0: tree_with(vectors), 1: TokenTree([5], [-1])})
    assert set(first) == {0}
    before = buffer.clone()
    again = rows.place({4: tree_with(vectors[::-1]), 2: tree_with(vectors[:1])})
    assert again == {4: first[0][::-1], 2: first[0][:1]}
    assert torch.equal(buffer, before)
    assert torch.equal(buffer[first[0]], torch.stack(vectors))
    assert rows.place({0: TokenTree([1], [-1])}) == {}


def test_a_vector_changed_in_place_is_copied_again():
    buffer = torch.zeros(8, 4)
    rows, vector = OwnRows(buffer), torch.randn(4)
    rows.place({0: tree_with([vector])})
    vector.mul_(2)
    assert torch.equal(placed(rows, buffer, {0: tree_with([vector])})[0][0], vector)


def test_a_full_buffer_makes_room():
    buffer = torch.zeros(4, 2)
    rows, old, new = OwnRows(buffer), torch.randn(3, 2).unbind(), torch.randn(2, 2).unbind()
    rows.place({0: tree_with(old)})
    mixed = [new[0], old[2], new[1]]
    assert torch.equal(placed(rows, buffer, {0: tree_with(mixed)})[0], torch.stack(mixed))
    assert torch.equal(placed(rows, buffer, {0: tree_with(old)})[0], torch.stack(old))


def test_the_layout_says_where_a_rows_embedding_lies():
    layout = DeviceLayout.allocate(Bucket(2, 8), "cpu")
    host = HostLayout(layout)
    vectors = torch.randn(2, 4).unbind()
    trees = {0: TokenTree([7], [-1]), 1: tree_with(vectors)}
    host.fill(trees, {0: 0, 1: 0}, {0: 0, 1: 1})
    assert host["embedded"][:4].tolist() == [0, 0, 3, 4], "by default at the row itself"
    host.fill(trees, {0: 0, 1: 0}, {0: 0, 1: 1}, own={1: [5, 2]})
    assert host["embedded"][:5].tolist() == [0, 0, 6, 3, 0]
