"""Running prompts through the engine, and holding the tokens against plain forward passes."""

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from architectures import ADMITTED, VOCABULARY

from shoestring.decoding.decode import Emission, Request, decode
from shoestring.decoding.drafters.lookahead import LookaheadDrafter
from shoestring.decoding.drafters.merged import MergedDrafter
from shoestring.decoding.drafters.ngram import NgramDrafter
from shoestring.decoding.drafters.pass_tokens import PassDrafter, TwoCallPassDrafter
from shoestring.decoding.drafters.protocol import Context, Drafter, StepObservation
from shoestring.decoding.look_ahead import LookAhead
from shoestring.decoding.stopping import StopChecker
from shoestring.decoding.tune import StepCost
from shoestring.engine.hf_runner import HFRunner
from shoestring.engine.sampling import SamplingOptions, noise, warp

GREEDY = SamplingOptions()
SAMPLED = SamplingOptions(temperature=0.9, top_p=0.95, top_k=20, repetition_penalty=1.3, seed=11)
TIE = 1e-4
"""Two tokens nearer than this may swap: sums run in another order in a step of another shape."""
FLAT_COST = StepCost((1, 8, 32, 128), (1.0, 1.01, 1.02, 1.03))
"""Rows cost next to nothing, so that the merged drafter drafts much; nothing is timed."""


@functools.cache
def untrained(tokens: int = 3, width: int = 64, scale: float = 0.5) -> LookAhead:
    """Random look-ahead embeddings: they predict nothing much, and must disturb nothing."""
    generator = torch.Generator().manual_seed(5)
    return LookAhead(torch.randn(tokens, width, generator=generator) * scale)


def prompt_of(length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[int]:
    """A prompt whose second half repeats parts of the first, so that n-grams are found."""
    chance = random.Random(seed)
    tokens = [chance.randrange(2, vocabulary) for _ in range((length + 1) // 2)]
    return (tokens + tokens[: length // 3] + [chance.randrange(2, vocabulary) for _ in range(length)])[
        :length
    ]


@dataclass
class Branches:
    """Drafts branches of which some follow `answer` for a while: right ones, wrong ones, and right ones gone wrong."""

    answer: Sequence[int]
    seed: int = 0
    vocabulary: int = VOCABULARY
    name: str = "branches"

    def begin(self, prompt: Sequence[int]) -> None:
        self._start, self._random = len(prompt), random.Random(self.seed)

    def propose(self, context: Context, budget: int) -> list[list[int]]:
        chance = self._random
        following = self.answer[len(context.tokens) - self._start :]
        branches = []
        for _ in range(chance.randrange(5)):
            right = list(following[: chance.randrange(5)])
            branches.append(right + [chance.randrange(self.vocabulary) for _ in range(chance.randrange(4))])
        return branches

    def observe(self, step: StepObservation) -> None:
        assert len(step.emitted) == len(step.accepted) + 1


STRATEGIES: Mapping[str, Callable[[Sequence[int]], Drafter | None]] = {
    "autoregressive": lambda answer: None,
    "lookahead": lambda answer: LookaheadDrafter(5, 4, 5),
    "lookahead-keep": lambda answer: LookaheadDrafter(4, 3, 4, prompt_pool=True, keep_window=True),
    "ngram": lambda answer: NgramDrafter(branches=2),
    "merged": lambda answer: MergedDrafter(FLAT_COST, budget=12),
    "branches": lambda answer: Branches(answer),
    "pass": lambda answer: PassDrafter(untrained(), budget=20),
    "pass-two-call": lambda answer: TwoCallPassDrafter(untrained()),
    "merged-pass": lambda answer: MergedDrafter(FLAT_COST, budget=16, look_ahead=untrained()),
}


def strategies_of(name: str) -> dict[str, Callable[[Sequence[int]], Drafter | None]]:
    """Every strategy that runs on an architecture: layers that look up token ids need one in every row."""
    needs_ids = ADMITTED[name].options.get("hidden_size_per_layer_input", 0)
    return {kind: make for kind, make in STRATEGIES.items() if not (needs_ids and "pass" in kind)}


@functools.cache
def plain_model(name: str) -> Any:
    """A model for plain forward passes and transformers' own `generate`; its attention is never switched."""
    model = ADMITTED[name].build()
    if name == "gemma2":  # transformers 5.17 takes SDPA by default, which leaves the soft cap out
        model.set_attn_implementation("eager")
    return model


@functools.cache
def _runner(name: str) -> HFRunner:
    return HFRunner(ADMITTED[name].build())


def runner_of(name: str) -> HFRunner:
    """The architecture's runner with nothing cached."""
    runner = _runner(name)
    assert not runner.cache.live, "a test left a slot open"
    runner.cache.clear()
    return runner


def request(
    prompt: Sequence[int],
    drafter: Drafter | None = None,
    sampling: SamplingOptions = GREEDY,
    most: int = 20,
    eos: Sequence[int] = (),
    **options: Any,
) -> Request:
    """A request without text."""
    return Request(
        prompt=list(prompt),
        sampling=sampling,
        stopping=StopChecker(None, eos, most),
        drafter=drafter,
        **options,
    )


def collect(emissions: Sequence[Emission]) -> dict[int, list[int]]:
    """Each request's tokens."""
    tokens: dict[int, list[int]] = {}
    for emission in emissions:
        tokens.setdefault(emission.request, []).append(emission.token)
    return tokens


def run(runner: HFRunner, requests: Sequence[Request], slots: int = 8) -> list[list[int]]:
    """The requests' tokens, in their order."""
    tokens = collect(list(decode(runner, requests, slots)))
    return [tokens[index] for index in range(len(requests))]


def generate(model: Any, prompt: Sequence[int], most: int = 20) -> list[int]:
    """What transformers' own greedy `generate` gives."""
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=most,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def gap(model: Any, sequence: Sequence[int], token: int, sampling: SamplingOptions = GREEDY) -> float:
    """How far below the best a token's (penalised, warped, noisy) score lies after `sequence` in a plain pass."""
    with torch.no_grad():
        logits = model(torch.tensor([sequence]), use_cache=False).logits[0, -1].double()
    return _gap(logits, sequence, token, sampling)


def _gap(logits: torch.Tensor, seen: Sequence[int], token: int, sampling: SamplingOptions) -> float:
    if sampling.repetition_penalty != 1:
        for old in set(seen):
            value = logits[old]
            logits[old] = (
                value / sampling.repetition_penalty if value > 0 else value * sampling.repetition_penalty
            )
    if not sampling.greedy:
        logits = warp(logits, sampling)
        logits = logits + noise(sampling, len(seen), torch.arange(len(logits)))
    return float(logits.max() - logits[token])


def assert_plain(
    model: Any, prompt: Sequence[int], tokens: Sequence[int], sampling: SamplingOptions = GREEDY
) -> None:
    """Each token is the one that a plain pass over all tokens before it gives (teacher-forced)."""
    sequence = [*prompt, *tokens]
    with torch.no_grad():
        logits = model(torch.tensor([sequence]), use_cache=False).logits[0].double()
    for at in range(len(prompt), len(sequence)):
        distance = _gap(logits[at - 1], sequence[:at], sequence[at], sampling)
        assert distance < TIE, f"token {at - len(prompt)} lies {distance:.2e} below the best"


def assert_same(
    model: Any,
    prompt: Sequence[int],
    tokens: Sequence[int],
    expected: Sequence[int],
    sampling: SamplingOptions = GREEDY,
) -> None:
    """Equal tokens; they may part only where two tokens tie in a plain pass."""
    if list(tokens) == list(expected):
        return
    parting = next(
        (at for at, (a, b) in enumerate(zip(tokens, expected, strict=False)) if a != b),
        min(len(tokens), len(expected)),
    )
    assert parting < min(len(tokens), len(expected)), f"{len(tokens)} tokens, expected {len(expected)}"
    before = [*prompt, *expected[:parting]]
    distance = max(gap(model, before, token, sampling) for token in (tokens[parting], expected[parting]))
    assert distance < TIE, f"parts at token {parting} with gap {distance:.2e}: {tokens} is not {expected}"
