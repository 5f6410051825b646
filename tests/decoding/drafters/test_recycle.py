from shoestring.decoding.drafters.recycle import SuccessorTable


def test_the_last_seen_successors_are_remembered_by_token_and_by_pair():
    table = SuccessorTable()
    table.update(1, 2, [5, 6])
    table.update(3, 2, [7, 8])
    assert table.after_pair(1, 2) == [5, 6]
    assert table.after_pair(3, 2) == [7, 8]
    assert table.after(2) == [7, 8]
    table.update(1, 2, [9])
    assert table.after_pair(1, 2) == table.after(2) == [9]


def test_what_was_never_seen_has_no_successors():
    table = SuccessorTable()
    assert list(table.after(1)) == list(table.after_pair(1, 2)) == []


def test_the_pairs_updated_longest_ago_make_room():
    table = SuccessorTable(entries=3)
    for token in (1, 2, 3):
        table.update(0, token, [token])
    table.update(0, 1, [9])
    table.update(0, 4, [4])
    assert [list(table.after_pair(0, token)) for token in (1, 2, 3, 4)] == [[9], [], [3], [4]]
