from comparing import prompt_of, request, run, runner_of
from hypothesis import given
from hypothesis import strategies as st

from shoestring.decoding.decode import decode
from shoestring.decoding.drafters.ngram import NgramDrafter, SuffixIndex
from shoestring.decoding.drafters.protocol import Context, Draft, StepObservation


def propose(drafter, tokens, budget=100):
    return drafter.propose(Context(list(tokens), 1), budget)


def observe(drafter, draft, accepted):
    drafter.observe(
        StepObservation(Context([1], 1), draft, [0] * (accepted + 1), list(range(accepted)), None, 1)
    )


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 39))
def test_the_index_finds_what_a_search_finds(tokens, longest, split):
    index = SuffixIndex(longest)
    index.extend(tokens[:split])
    index.extend(tokens)
    for length in range(1, min(longest, len(tokens)) + 1):
        suffix = tuple(tokens[-length:])
        found = [end for end in range(length, len(tokens)) if tuple(tokens[end - length : end]) == suffix]
        assert index.positions(suffix) == found[::-1][:8]


def test_the_longest_match_is_continued_and_the_most_recent_of_equals():
    text = [1, 2, 3, 7, 7, 2, 3, 8, 8, 1, 2, 3]
    assert propose(NgramDrafter(tokens=3), text).tokens == [7, 7, 2]
    assert propose(NgramDrafter(longest=2, tokens=3), text).tokens == [8, 8, 1]


def test_other_continuations_become_branches():
    text = [1, 2, 5, 1, 2, 6, 1, 2, 7, 1, 2]
    assert propose(NgramDrafter(tokens=1, branches=2), text).tokens == [7, 6]
    assert propose(NgramDrafter(tokens=1, branches=9), text).tokens == [7, 6, 5]
    merged = propose(NgramDrafter(tokens=2, branches=2), [1, 5, 6, 9, 1, 5, 7, 9, 1])
    assert merged.tokens == [5, 7, 6]
    assert merged.parents == [-1, 0, 0]


def test_matches_shorter_than_the_shortest_do_not_count():
    assert len(propose(NgramDrafter(shortest=2), [1, 2, 3, 1])) == 0
    assert propose(NgramDrafter(shortest=1), [1, 2, 3, 1]).tokens == [2, 3, 1]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(0, 6), st.integers(1, 4))
def test_the_budget_is_kept(tokens, budget, branches):
    assert len(propose(NgramDrafter(tokens=5, branches=branches), tokens, budget)) <= budget


@given(st.integers(1, 12), st.lists(st.integers(0, 12), max_size=20))
def test_the_depth_stays_within_what_was_asked_for(tokens, hits):
    drafter = NgramDrafter(tokens=tokens)
    for hit in hits:
        draft = propose(drafter, [*range(40), *range(20)])
        assert 1 <= len(draft) <= tokens
        observe(drafter, draft, min(hit, len(draft)))


def test_drafts_become_shorter_after_misses_and_longer_after_hits():
    drafter = NgramDrafter(tokens=8)
    text, lengths = [*range(40), *range(20)], []
    for accepted in (8, 0, 0, 0, 2, 4, 8):
        draft = propose(drafter, text)
        lengths.append(len(draft))
        observe(drafter, draft, accepted)
    assert lengths == [8, 8, 4, 2, 2, 4, 8]
    observe(drafter, Draft(), 0)
    assert len(propose(drafter, text)) == 8, "a step without a draft says nothing"


def test_a_drafter_used_again_drafts_as_a_new_one():
    def steps(drafter):
        emissions = decode(runner_of("llama"), [request(prompt_of(30), drafter, most=12)])
        return [(emission.token, emission.step, emission.draft) for emission in emissions]

    used = NgramDrafter(tokens=9)
    run(runner_of("llama"), [request(prompt_of(30, seed=5), used, most=12)])
    assert steps(used) == steps(NgramDrafter(tokens=9))
