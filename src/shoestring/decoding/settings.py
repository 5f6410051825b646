"""A decoding strategy as the user names it: a word, a call with numbers, or a settings object."""

import ast
import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shoestring.decoding.drafters.datastore import Datastore
from shoestring.decoding.drafters.draft_model import DraftModelDrafter
from shoestring.decoding.drafters.lookahead import LookaheadDrafter
from shoestring.decoding.drafters.merged import MergedDrafter
from shoestring.decoding.drafters.ngram import NgramDrafter
from shoestring.decoding.drafters.pass_tokens import PassDrafter, TwoCallPassDrafter
from shoestring.decoding.drafters.protocol import Drafter
from shoestring.decoding.drafters.rates import AcceptanceRates
from shoestring.decoding.governor import Governor
from shoestring.decoding.look_ahead import LookAhead
from shoestring.decoding.tune import StepCost
from shoestring.engine.runner import Runner
from shoestring.engine.sampling import SamplingOptions
from shoestring.errors import RequestError, suggest

__all__ = [
    "Auto",
    "Autoregressive",
    "Decoding",
    "DraftModel",
    "DraftingEnvironment",
    "Lookahead",
    "Ngram",
    "Pass",
    "as_decoding",
    "describe",
    "needs_step_cost",
]


@dataclass
class DraftingEnvironment:
    """What drafters may need from the loaded model; costly parts are made when first asked for.

    What its steps have shown so far serves later requests: what drafts win, and how often each kind of guess comes true.
    No text is kept.
    """

    step_cost: Callable[[], StepCost]
    load_draft_runner: Callable[[str], Runner]
    look_ahead: LookAhead | None = None
    successors: Callable[[], np.ndarray | None] = lambda: None
    """What the model finds likely after each token alone; None: not known."""
    datastore: Callable[[], Datastore | None] = lambda: None
    """Texts that the model wrote by itself; None: it has none."""
    governors: dict[str, Governor] = field(default_factory=dict, init=False)
    """By strategy: one that loses says nothing of another."""
    rates: AcceptanceRates = field(init=False)

    def __post_init__(self) -> None:
        self.rates = AcceptanceRates(self.look_ahead.priors if self.look_ahead else None)

    def governor(self, settings: "Decoding", promising: bool = True) -> Governor:
        """Who times the steps of a strategy; one that does not promise to pay is tried rarely, and not for long."""
        name = describe(settings)
        if name not in self.governors:
            self.governors[name] = Governor() if promising else Governor(limit=2.0, allowance=0.01, grace=2.0)
        return self.governors[name]


def _at_least(settings: object, **least: int) -> None:
    for name, value in least.items():
        given = getattr(settings, name)
        whole = isinstance(given, int) and not isinstance(given, bool)
        if given is not None and (not whole or given < value):
            kind = type(settings).__name__.lower()
            raise RequestError(f"{kind}: {name} is {given!r}; it must be a whole number of at least {value}")


def _true_or_false(settings: object, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(settings, name), bool):
            kind = type(settings).__name__.lower()
            raise RequestError(f"{kind}: {name} is {getattr(settings, name)!r}; it must be true or false")


@dataclass(frozen=True)
class Autoregressive:
    """Plain decoding: one token per step."""

    def drafter(self, environment: DraftingEnvironment, sampling: SamplingOptions) -> Drafter | None:
        """Nothing drafts."""
        return None


@dataclass(frozen=True)
class Lookahead:
    """Lookahead decoding, the paper's algorithm, with the numbers given.

    Without numbers it sizes itself from the measured cost of a step, and rests where its steps lose to plain ones.

    Args:
        window, ngram, guesses: W, N, G of the paper; the paper's choice for 7B models on a GPU is 15, 5, 15.
        prompt_pool: also take n-grams from the prompt and the output.
        keep_window: also accept window rows that turn out right.
    """

    window: int | None = None
    ngram: int | None = None
    guesses: int | None = None
    prompt_pool: bool = False
    keep_window: bool = False

    def __post_init__(self) -> None:
        _at_least(self, window=1, ngram=2, guesses=1)
        _true_or_false(self, "prompt_pool", "keep_window")

    def drafter(self, environment: DraftingEnvironment, sampling: SamplingOptions) -> Drafter | None:
        """A lookahead drafter of the given or measured size."""
        window, ngram, guesses = self.window, self.ngram, self.guesses
        sizes_itself = window is None or ngram is None or guesses is None
        promising = True
        if window is None or ngram is None or guesses is None:
            *sized, speed = _affordable_lookahead(environment.step_cost())
            promising = speed > 1
            window, ngram, guesses = window or sized[0], ngram or sized[1], guesses or sized[2]
        drafter = LookaheadDrafter(
            window,
            ngram,
            guesses,
            prompt_pool=self.prompt_pool,
            keep_window=self.keep_window,
            seed=sampling.seed,
        )
        if sizes_itself:
            drafter.governor = environment.governor(self, promising)
        return drafter


@dataclass(frozen=True)
class Ngram:
    """Suffix matches in prompt and output (prompt lookup), longest first.

    Args:
        longest, shortest: lengths of the suffix looked for.
        tokens: the most tokens of a branch.
        branches: the most different continuations.
    """

    longest: int = 4
    shortest: int = 1
    tokens: int = 10
    branches: int = 1

    def __post_init__(self) -> None:
        _at_least(self, longest=1, shortest=1, tokens=1, branches=1)
        if self.shortest > self.longest:
            raise RequestError(f"ngram: shortest is {self.shortest}, more than longest ({self.longest})")

    def drafter(self, environment: DraftingEnvironment, sampling: SamplingOptions) -> Drafter | None:
        """A suffix-match drafter."""
        return NgramDrafter(self.longest, self.shortest, self.tokens, self.branches)


@dataclass(frozen=True)
class DraftModel:
    """A smaller model with the same tokenizer drafts a chain.

    Args:
        model: its name, folder or file, as for `load`.
        tokens: drafted tokens per step.
    """

    model: str
    tokens: int = 5

    def __post_init__(self) -> None:
        _at_least(self, tokens=1)

    def drafter(self, environment: DraftingEnvironment, sampling: SamplingOptions) -> Drafter | None:
        """A drafter with a slot of its own in the draft model's runner."""
        runner = environment.load_draft_runner(self.model)
        return DraftModelDrafter(runner, self.tokens, sampling)


@dataclass(frozen=True)
class Pass:
    """PaSS: the model drafts for itself through trained look-ahead embeddings, which `load` must have been given.

    Args:
        two_call: the paper's loop, in which every second call only drafts; else one call verifies and drafts.
        tokens: how many of the embeddings to use; None: all.
        candidates: the most tokens tried at a position; 1 drafts a chain.
        budget: the most rows of a step beside the last token's; None: whatever the measured step cost makes worthwhile.
    """

    two_call: bool = False
    tokens: int | None = None
    candidates: int | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        _true_or_false(self, "two_call")
        _at_least(self, tokens=1, candidates=1, budget=1)
        for name in ("candidates", "budget"):
            if self.two_call and getattr(self, name) is not None:
                raise RequestError(
                    f"pass: {name} belongs to the fused form; two_call drafts one chain of all its tokens"
                )

    def drafter(self, environment: DraftingEnvironment, sampling: SamplingOptions) -> Drafter | None:
        """A PaSS drafter with the loaded embeddings."""
        if environment.look_ahead is None:
            raise RequestError(
                "pass needs look-ahead embeddings, and there are none for this model; train them with `shoestring "
                "train recipes/pass-smollm2.yaml model=NAME`, then give load look_ahead=FILE (--look-ahead FILE)"
            )
        look_ahead = environment.look_ahead.first(self.tokens)
        if self.two_call:
            return TwoCallPassDrafter(look_ahead)
        cost = environment.step_cost() if self.budget is None else None
        return PassDrafter(look_ahead, cost, self.budget, self.candidates or 4, environment.rates)


@dataclass(frozen=True)
class Auto:
    """Merged drafts (suffix matches, recycled successors, PaSS, a datastore), as many rows as pay on this machine.

    Args:
        budget: rows of a step beside the last token's; None: whatever the measured step cost makes worthwhile.
        look_ahead: use PaSS where look-ahead embeddings are loaded.
    """

    budget: int | None = None
    look_ahead: bool = True

    def __post_init__(self) -> None:
        _at_least(self, budget=1)
        _true_or_false(self, "look_ahead")

    def drafts(self, step_cost: Callable[[], StepCost]) -> bool:
        """Whether any rows can pay, or a budget was given."""
        return self.budget is not None or step_cost().pays()

    def drafter(self, environment: DraftingEnvironment, sampling: SamplingOptions) -> Drafter | None:
        """The merged drafter, or plain decoding where no rows can pay."""
        look_ahead = environment.look_ahead if self.look_ahead else None
        if not self.drafts(environment.step_cost):
            return None
        cost = None if self.budget is not None else environment.step_cost()
        governor = None if cost is None else environment.governor(self)
        return MergedDrafter(
            cost,
            self.budget,
            rates=environment.rates,
            look_ahead=look_ahead,
            governor=governor,
            known=environment.successors(),
            datastore=environment.datastore(),
        )


Decoding = Autoregressive | Lookahead | Ngram | DraftModel | Pass | Auto

_NAMES: dict[str, type[Any]] = {
    "autoregressive": Autoregressive,
    "lookahead": Lookahead,
    "ngram": Ngram,
    "draft_model": DraftModel,
    "pass": Pass,
    "auto": Auto,
}
_COMMA = re.compile(r""",(?=(?:[^"']|"[^"]*"|'[^']*')*$)""")  # outside quotes
_CALL = re.compile(r"\s*([\w -]+?)\s*(?:\((.*)\))?\s*", re.DOTALL)


def as_decoding(decoding: "str | Decoding | Drafter") -> "Decoding | Drafter":
    """Turn `"lookahead(window=15, ngram=5, guesses=15)"`, a name, settings or a drafter into settings or a drafter.

    Raises:
        RequestError: an unknown strategy or option, with the nearest known one.
    """
    if not isinstance(decoding, str):
        if isinstance(decoding, Decoding | Drafter):
            return decoding
        raise RequestError(
            f"decoding is a {type(decoding).__name__}; give a name, a settings object or a drafter "
            "(begin, propose, observe)"
        )
    match = _CALL.fullmatch(decoding)
    name = re.sub(r"[ -]", "_", match[1].lower()) if match else decoding
    if match is None or name not in _NAMES:
        raise RequestError(
            f"unknown decoding strategy {decoding!r}{suggest(name, _NAMES)}; known: {', '.join(_NAMES)}"
        )
    kind = _NAMES[name]
    arguments = _arguments(decoding, match[2] or "")
    known = [item.name for item in dataclasses.fields(kind)]
    for option in arguments:
        if option not in known:
            options = ", ".join(known) or "none"
            raise RequestError(f"{name} has no option {option!r}{suggest(option, known)}; it has: {options}")
    missing = [
        item.name
        for item in dataclasses.fields(kind)
        if item.default is dataclasses.MISSING and item.name not in arguments
    ]
    if missing:
        raise RequestError(f"{name} needs {missing[0]}: {name}({missing[0]}=...)")
    settings: Decoding = kind(**arguments)
    return settings


def needs_step_cost(decoding: "Decoding | Drafter") -> bool:
    """Whether the strategy sizes itself by the measured cost of a step."""
    if isinstance(decoding, Lookahead):
        return None in (decoding.window, decoding.ngram, decoding.guesses)
    if isinstance(decoding, Pass):
        return decoding.budget is None and not decoding.two_call
    return isinstance(decoding, Auto) and decoding.budget is None


def describe(decoding: "Decoding | Drafter") -> str:
    """The strategy as text that `as_decoding` reads (a user's drafter: its name)."""
    for name, kind in _NAMES.items():
        if isinstance(decoding, kind):
            changed = [
                f"{item.name}={value!r}"
                for item in dataclasses.fields(kind)
                if (value := getattr(decoding, item.name)) != item.default
            ]
            return f"{name}({','.join(changed)})" if changed else name
    return str(getattr(decoding, "name", type(decoding).__name__))


def _arguments(text: str, inside: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in _COMMA.split(inside))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name.isidentifier() or not value:
            raise RequestError(
                f"cannot read {part!r} in {text!r}; write it like lookahead(window=15,ngram=5)"
            )
        try:
            # true and false as in JSON; a bare word is a string: draft_model(model=smollm2-135m)
            values[name] = ast.literal_eval(
                {"true": "True", "false": "False", "none": "None"}.get(value, value)
            )
        except (ValueError, SyntaxError):
            values[name] = value
    return values


def _affordable_lookahead(cost: StepCost) -> tuple[int, int, int, float]:
    """The (window, ngram, guesses) with the most predicted tokens/s, and how many times plain decoding's those are.

    Tokens per step grow with log rows (section 3.4).
    """
    sizes = [(15, 5, 15), (10, 5, 10), (7, 5, 7), (5, 5, 5), (5, 4, 5), (4, 4, 4), (4, 3, 4), (2, 3, 3)]

    def speed(size: tuple[int, int, int]) -> float:
        rows = (size[0] + size[2]) * (size[1] - 1)
        return (1 + 0.14 * math.log2(rows)) * cost.of(1) / cost.of(1 + rows)

    best = max(sizes, key=speed)
    return *best, speed(best)
