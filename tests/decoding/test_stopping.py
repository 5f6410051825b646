import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring import hub
from shoestring.decoding.stopping import IncrementalDetokenizer, StopChecker
from shoestring.errors import RequestError


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(hub.resolve("smollm2-135m"))


def ids(tokenizer, text):
    return tokenizer(text)["input_ids"]


def push_all(checker, tokens):
    """The pieces until the sequence ends."""
    pieces = []
    for token in tokens:
        pieces.append(checker.push(token))
        if checker.finish_reason:
            break
    return pieces


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(
    st.sampled_from(
        ["the ", " cat", "\n\n", "    ", "é", "日本", "🙂", "👩‍👩‍👧", "\ufffd", "�", "ﷺ", "\t", "x"]
    ),
    max_size=25,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_the_pieces_joined_are_the_decoded_whole(tokenizer, text):
    tokens = ids(tokenizer, text)
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokens] + [detokenizer.flush()]
    assert "".join(pieces) == tokenizer.decode(tokens)  # not `text`: the vocabulary lacks a few bytes


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_so_they_are_for_any_tokens_half_characters_and_markers_included(tokenizer, data):
    tokens = data.draw(st.lists(st.integers(0, 400) | st.integers(0, len(tokenizer) - 1), max_size=50))
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokens] + [detokenizer.flush()]
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_characters_split_across_tokens_come_out_whole(tokenizer):
    tokens = ids(tokenizer, "a𐍈b")
    assert len(tokens) > 3, "the character must take several tokens"
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in tokens]
    assert "".join(pieces) == "a𐍈b"
    assert "" in pieces
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_long_text_costs_no_more_per_token_than_a_short_one(tokenizer):
    detokenizer = IncrementalDetokenizer(tokenizer)
    for token in ids(tokenizer, "The cat sat on the mat, and so on. " * 40):
        detokenizer.push(token)
        assert len(detokenizer._tokens) - detokenizer._start < 20


@pytest.mark.parametrize("stop", ["sat on", "t on", " sat", "e cat sat on the m", "T", "mat."])
def test_the_text_ends_before_a_stop_string_wherever_the_tokens_split_it(tokenizer, stop):
    text = "The cat sat on the mat."
    checker = StopChecker(tokenizer, stop=[stop])
    pieces = push_all(checker, ids(tokenizer, text))
    assert "".join(pieces) == text[: text.index(stop)]
    assert checker.finish_reason == "stop"
    assert tokenizer.decode(ids(tokenizer, text)[: checker.count]).find(stop) >= 0


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_what_is_given_out_is_the_text_up_to_the_first_of_several_stop_strings(tokenizer, data):
    letters = st.text("ab \n", min_size=1, max_size=4)
    text = data.draw(st.text("ab \n", max_size=40))
    stops = data.draw(st.lists(letters, max_size=3))
    tokens = ids(tokenizer, text)
    checker = StopChecker(tokenizer, eos_ids=[0], max_new_tokens=100, stop=stops)
    given_out = "".join(push_all(checker, [*tokens, 0]))
    # Which string is met first depends on where tokens end: the reference looks after every token too.
    expected = text
    for count in range(1, len(tokens) + 1):
        seen = tokenizer.decode(tokens[:count])
        found = [seen.find(stop) for stop in stops if stop in seen]
        if found:
            expected = seen[: min(found)]
            break
    assert given_out == expected
    assert checker.finish_reason == "stop"


def test_nothing_of_a_stop_string_is_given_out_before_it_is_decided(tokenizer):
    checker = StopChecker(tokenizer, stop=["\n\nUser:"])
    shown = ""
    for piece in push_all(checker, ids(tokenizer, "Yes.\n\nUse it.\n\nUser: no")):
        shown += piece
        assert not shown.endswith(("\n", "\n\n", "\n\nUser"))
    assert shown == "Yes.\n\nUse it."


def test_text_held_back_comes_out_at_the_end(tokenizer):
    tokens = ids(tokenizer, "one\n\nUser")
    for end in ("eos", "length", "outside"):
        most = len(tokens) if end == "length" else 99
        checker = StopChecker(tokenizer, [0], most, ["\n\nUser:"])
        pieces = push_all(checker, tokens + ([0] if end == "eos" else []))
        if end == "outside":
            assert "".join(pieces) == "one"
            pieces.append(checker.end("length"))
        assert "".join(pieces) == "one\n\nUser"
        assert checker.finish_reason == ("stop" if end == "eos" else "length")


def test_an_incomplete_character_at_the_end_is_shown_as_such(tokenizer):
    tokens = ids(tokenizer, "𐍈")
    checker = StopChecker(tokenizer, max_new_tokens=len(tokens) - 1)
    assert "".join(push_all(checker, tokens[:-1])) == "\ufffd"


def test_eos_ends_the_text_before_a_stop_string_after_it_and_is_not_shown(tokenizer):
    checker = StopChecker(tokenizer, [0, 2], stop=["END"])
    tokens = [*ids(tokenizer, "fine"), 2, *ids(tokenizer, " END")]
    assert "".join(push_all(checker, tokens)) == "fine"
    assert checker.count == len(ids(tokenizer, "fine")) + 1


def test_without_a_tokenizer_tokens_are_counted_and_there_is_no_text():
    checker = StopChecker(None, [5], 3)
    assert push_all(checker, [1, 2, 3, 4]) == ["", "", ""]
    assert checker.finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"stop": ["x", ""]}, "a stop string is empty"),
        ({"stop": ["x"]}, "need a tokenizer"),
    ],
    ids=str,
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        StopChecker(None, **options)
