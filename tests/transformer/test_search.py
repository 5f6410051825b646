import itertools

import pytest
import torch
from lively import lively
from torch.nn import functional as F

from shoestring.transformer.decoder_state import CachedDecoder
from shoestring.transformer.marian import as_marian
from shoestring.transformer.search import SearchOptions, _Beam, _Greedy, search
from shoestring.transformer.stepping import graph_window


def assert_same_texts(a, b):
    assert [[h.tokens for h in row] for row in a] == [[h.tokens for h in row] for row in b]
    for one, other in zip(itertools.chain(*a), itertools.chain(*b), strict=True):
        assert one.score == pytest.approx(other.score, abs=1e-5)


@pytest.mark.parametrize("beam", [1, 4])
def test_cached_is_uncached(model, batch, beam):
    cached = search(model, *batch, SearchOptions(beam=beam, extra_length=12), best=beam)
    plain = search(model, *batch, SearchOptions(beam=beam, extra_length=12, cached=False), best=beam)
    assert_same_texts(cached, plain)
    assert len({len(row[0].tokens) for row in cached}) > 1, "the texts should end at different lengths"


@pytest.mark.parametrize("beam", [1, 4])
def test_batch_is_single(model, batch, beam):
    ids, mask = batch
    options = SearchOptions(beam=beam, extra_length=12)
    alone = [
        search(model, ids[n : n + 1, : mask[n].sum()], None, options, best=beam)[0] for n in range(len(ids))
    ]
    assert_same_texts(search(model, ids, mask, options, best=beam), alone)


@pytest.mark.parametrize("kind", [_Greedy, _Beam])
def test_steps_in_wide_windows_are_those_in_exact_ones(model, batch, kind):
    """What CUDA graphs replay: windows that reach past the present position, masked."""
    ids, mask = batch
    options = SearchOptions(beam=1 if kind is _Greedy else 3, extra_length=40)
    limits = mask.sum(1) + options.extra_length
    longest = int(limits.max())
    with torch.no_grad():
        decoder = CachedDecoder(model, ids, mask, options.beam, longest, exact=False)
        state = kind(model, decoder, limits, longest, options, 1)
        for at in range(longest):
            state.step(graph_window(at, longest))
    assert_same_texts(state.results(), search(model, ids, mask, options))


def test_windows():
    assert [graph_window(at, 100) for at in (0, 31, 32, 63, 64, 99)] == [32, 32, 64, 64, 100, 100]
    assert graph_window(3, 7) == 7


def test_beam_finds_the_best_of_all_texts(batch):
    """With a beam as wide as the vocabulary and two positions, nothing is pruned: compare with enumeration."""
    model = lively("paper-tiny", vocab_size=7)
    ids = torch.tensor([[4, 5, 2]])
    options = SearchOptions(beam=7, extra_length=-1, length_penalty=0.8)
    found = search(model, ids, None, options, best=3)[0]
    scored = []
    for text in [(2,), *((a, b) for a in range(3, 7) for b in (2, *range(3, 7)))]:
        logits = model(ids, decoder_input_ids=torch.tensor([[1, *text[:-1]]])).logits[0].detach()
        logs = F.log_softmax(logits, -1)
        total = sum(float(logs[place, token]) for place, token in enumerate(text))
        tokens = list(text[:-1]) if text[-1] == 2 else list(text)
        scored.append((total / ((5 + len(text)) / 6) ** 0.8, tokens))
    best = sorted(scored, reverse=True)[:3]
    assert [h.tokens for h in found] == [tokens for _, tokens in best]
    assert [h.score for h in found] == pytest.approx([value for value, _ in best], abs=1e-5)


def test_stopping_early_changes_nothing(model, batch):
    """All of a beam's texts are those of a search that may not stop before its limits."""
    options = SearchOptions(beam=3, extra_length=20)
    ids, mask = batch
    limits = mask.sum(1) + options.extra_length
    longest = int(limits.max())
    with torch.no_grad():
        decoder = CachedDecoder(model, ids, mask, 3, longest, exact=True)
        state = _Beam(model, decoder, limits, longest, options, 3)
        state._most = state._most * 0 + 1e-9  # no bound is ever met
        for at in range(longest):
            state.step(at + 1)
    assert_same_texts(search(model, ids, mask, options, best=3), state.results())


@pytest.mark.parametrize("beam", [1, 4])
def test_texts_are_what_transformers_generates(beam):
    """Without a length penalty both mean the likeliest text; ours goes through HF's own decoding loop, too."""
    model = lively("paper-tiny")
    torch.manual_seed(1)
    ids = torch.randint(3, 40, (6, 9))
    texts = search(model, ids, None, SearchOptions(beam=beam, extra_length=12, length_penalty=0))
    for subject in (model, as_marian(model)):
        out = subject.generate(
            input_ids=ids, num_beams=beam, do_sample=False, max_new_tokens=21, suppress_tokens=[0, 1],
            **({"length_penalty": 0.0} if beam > 1 else {}),
        )  # fmt: skip
        theirs = [list(itertools.takewhile(lambda t: t != 2, row[1:])) for row in out.tolist()]
        assert [[t for t in row if t > 2] for row in theirs] == [row[0].tokens for row in texts]
