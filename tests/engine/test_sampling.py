import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from shoestring.engine import sampling
from shoestring.engine.sampling import SamplingOptions, likely_draws, next_token, next_tokens, noise, warp
from shoestring.errors import RequestError


def random_logits(seed, size=60, spread=2.0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def chi_square(counts, probabilities, draws):
    """Pearson's statistic over its degrees of freedom, as a z-score (Wilson-Hilferty)."""
    expected = torch.as_tensor(probabilities, dtype=torch.float64) * draws
    observed = torch.tensor([counts.get(token, 0) for token in range(len(expected))], dtype=torch.float64)
    assert observed[expected == 0].sum() == 0, "a token without probability was drawn"
    common = expected >= 5
    observed = torch.cat([observed[common], observed[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    ratio = float(((observed - expected) ** 2 / expected).sum()) / freedom
    return (ratio ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.6, "top_k": 12},
        {"temperature": 1.4, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.05},
        {"temperature": 0.9, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.3},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [24, 700])  # 700: behind the prefilter
def test_draws_follow_the_warped_distribution(options, size):
    logits, draws, seen = random_logits(1, size), 4000, [3, 5, 5]
    counts = Counter(
        next_token(logits, SamplingOptions(**options, seed=index // 50), position=index % 50, seen=seen)
        for index in range(draws)
    )
    reference = logits.clone()
    if "repetition_penalty" in options:
        reference = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([seen]), logits[None].clone())[0]
    probabilities = warp(reference.double(), SamplingOptions(**options)).softmax(-1)
    assert abs(chi_square(counts, probabilities, draws)) < 4


def test_the_chi_square_would_notice_a_wrong_distribution():
    logits = random_logits(1, 24)
    counts = Counter(
        next_token(logits, SamplingOptions(temperature=1, seed=index // 50), index % 50)
        for index in range(4000)
    )
    assert chi_square(counts, (logits / 1.1).softmax(-1), 4000) > 4


OPTIONS = st.builds(
    SamplingOptions,
    temperature=st.floats(0.2, 2.0),
    top_k=st.sampled_from([0, 0, 1, 7, 50, 255, 256, 300, 5000]),
    top_p=st.sampled_from([1.0, 1e-6, 0.3, 0.9, 0.95, 0.999]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    seed=st.integers(-5, 2**70),
    sample=st.integers(0, 3),
)


@settings(max_examples=150, deadline=None)
@given(OPTIONS, st.integers(0, 1000), st.sampled_from([0.5, 2.0, 6.0]), st.integers(0, 9000), st.booleans())
def test_the_prefilter_changes_nothing(options, seed, spread, position, masked):
    logits = random_logits(seed, 1500, spread)
    allowed = torch.rand(1500, generator=torch.Generator().manual_seed(seed)) < 0.1 if masked else None
    fast = next_token(logits, options, position, [1, 2, 3], allowed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_PREFILTER", 10**9)
        slow = next_token(logits, options, position, [1, 2, 3], allowed)
    assert fast == slow
    assert allowed is None or allowed[fast]


@settings(max_examples=60, deadline=None)
@given(OPTIONS, st.integers(0, 1000))
def test_the_prefilter_changes_nothing_where_low_precision_makes_ties(options, seed):
    logits = random_logits(seed, 1500, 2.0).bfloat16()
    fast = next_token(logits, options, 5, [1, 2, 3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_PREFILTER", 10**9)
        assert fast == next_token(logits, options, 5, [1, 2, 3])


@settings(max_examples=100, deadline=None)
@given(OPTIONS, st.integers(0, 1000))
def test_the_filters_keep_what_those_of_transformers_keep(options, seed):
    logits = random_logits(seed, 300)
    seen = [1, 2, 2, 9]
    processors = [RepetitionPenaltyLogitsProcessor(options.repetition_penalty)]
    processors.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        processors.append(TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        processors.append(TopPLogitsWarper(options.top_p))
    if options.min_p:
        processors.append(MinPLogitsWarper(options.min_p))
    theirs = logits[None].clone()
    for processor in processors:
        theirs = processor(torch.tensor([seen]), theirs)
    ours = warp(sampling._constrain(logits, options, seen, None), options)
    assert torch.equal(ours.isinf(), theirs[0].isinf())
    torch.testing.assert_close(ours.softmax(-1), theirs[0].softmax(-1))


def test_noise_is_gumbel_and_independent():
    tokens = torch.arange(2000)

    def uniform(seed, sample, position):
        values = noise(SamplingOptions(temperature=1, seed=seed, sample=sample), position, tokens)
        assert values.isfinite().all()
        return torch.exp(-torch.exp(-values.double()))

    keys = [(seed, sample, position) for seed in (0, 1) for sample in (0, 1) for position in (0, 1, 2, 511)]
    table = torch.stack([uniform(*key) for key in keys])
    counts = torch.histc(table, bins=100, min=0, max=1)
    z = (float(((counts - counts.mean()) ** 2 / counts.mean()).sum()) - 99) / math.sqrt(2 * 99)
    assert abs(z) < 4
    # Between any two keys, between neighbouring tokens, and between bits far apart.
    correlation = torch.corrcoef(table) - torch.eye(len(keys))
    assert correlation.abs().max() < 5 / math.sqrt(2000)
    for lag in (1, 2, 64, 256, 1024):
        both = torch.corrcoef(torch.stack([table[:, lag:].flatten(), table[:, :-lag].flatten()]))
        assert abs(both[0, 1]) < 5 / math.sqrt(table[:, lag:].numel())
    assert table.unique().numel() > 0.999 * table.numel()


def test_noise_depends_on_the_token_alone_not_on_where_it_stands():
    options = SamplingOptions(temperature=1, seed=3)
    shuffled = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noise(options, 7, shuffled), noise(options, 7, torch.arange(500))[shuffled])


def test_noise_is_the_same_for_ever():
    # Seeds are part of what users write down: the numbers may not change between versions.
    values = noise(SamplingOptions(temperature=1, seed=42), 10, torch.tensor([0, 1, 50000]))
    torch.testing.assert_close(values, torch.tensor(GOLDEN_NOISE), atol=1e-5, rtol=0)


GOLDEN_NOISE = [-0.1158865, -0.4250701, 0.7327436]


@pytest.mark.parametrize(
    "bad",
    [
        {name: value}
        for name, values in {
            "temperature": (-1, math.nan, math.inf),
            "top_k": (-1, math.nan),
            "top_p": (0, -0.5, 1.5, math.nan, math.inf),
            "min_p": (-0.1, 1, math.nan, math.inf),
            "repetition_penalty": (0, -1, math.nan, math.inf),
        }.items()
        for value in values
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_by_name(bad):
    with pytest.raises(RequestError, match=next(iter(bad))):
        SamplingOptions(**bad)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("size", [50, 900])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}], ids=str
)
def test_broken_logits_are_an_error(broken, size, options):
    logits = random_logits(0, size)
    logits[17] = broken
    with pytest.raises(RequestError, match="not finite"):
        next_token(logits, SamplingOptions(**options), 3)


@pytest.mark.parametrize("size", [50, 900])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 5}, {"temperature": 1.0, "top_p": 0.5}],
    ids=str,
)
def test_a_grammar_that_allows_nothing_says_so(size, options):
    with pytest.raises(RequestError, match="grammar"):
        next_token(
            random_logits(0, size), SamplingOptions(**options), 3, allowed=torch.zeros(size, dtype=torch.bool)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_ties_take_the_first(dtype):
    logits = torch.zeros(500, dtype=dtype)
    logits[[40, 41, 300]] = 2.0
    assert next_token(logits, SamplingOptions(), 0) == 40
    assert next_token(logits, SamplingOptions(repetition_penalty=2.0), 0, seen=[40]) == 41


def test_tokens_that_no_probability_is_left_for_are_never_drawn():
    logits = torch.full((400,), -math.inf)
    logits[[3, 200]] = torch.tensor([0.0, 1.0])
    for options in ({}, {"top_k": 5}, {"top_p": 0.99}, {"min_p": 0.01}):
        drawn = {next_token(logits, SamplingOptions(temperature=1, seed=s, **options), 0) for s in range(40)}
        assert drawn == {3, 200}


@pytest.mark.parametrize("options", [{}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.05}], ids=str)
def test_likely_draws_begin_with_the_draw_itself(options):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, 900, generator=generator) * 4
    sampling = SamplingOptions(temperature=0.8, seed=9, **options)
    drawn = likely_draws(logits, sampling, range(10, 16), 4)
    for row, position in enumerate(range(10, 16)):
        assert drawn[row][0] == next_token(logits[row], sampling, position)
        assert len(set(drawn[row])) == len(drawn[row]) <= 4
    assert len(likely_draws(logits, SamplingOptions(temperature=1, top_k=2), [1] * 6, 4)[0]) == 2


@pytest.mark.parametrize(
    "options",
    [
        SamplingOptions(temperature=0.8, seed=4),
        SamplingOptions(temperature=0.7, top_k=40, seed=4),
        SamplingOptions(temperature=1.3, top_k=300, seed=4),
        SamplingOptions(temperature=0.9, top_p=0.9, seed=4),
        SamplingOptions(temperature=2.5, top_p=0.999, seed=4),  # more than 256 survive
        SamplingOptions(temperature=0.9, min_p=0.05, seed=4),
        SamplingOptions(temperature=0.9, top_p=0.8, min_p=0.01, top_k=50, seed=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_rows_draw_what_each_draws_alone(options, dtype):
    torch.manual_seed(1)
    logits = (torch.randn(40, 700) * 3).to(dtype)  # bfloat16 has ties
    logits[3, 100:500] = logits[3].max()
    positions = list(range(7, 47))
    expected = [next_token(row, options, at) for row, at in zip(logits, positions, strict=True)]
    assert next_tokens(logits, options, positions) == expected
