"""What generating gives (`Generation`, `Piece`, `Score`), and the session that turns one call into requests."""

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from shoestring.decoding.decode import Emission, Request, check_prompt, decode
from shoestring.decoding.drafters.protocol import Drafter
from shoestring.decoding.settings import Auto, Decoding, DraftingEnvironment, as_decoding, describe
from shoestring.decoding.stopping import StopChecker
from shoestring.engine.runner import Runner
from shoestring.engine.sampling import SamplingOptions
from shoestring.errors import RequestError

__all__ = ["Generation", "Message", "Piece", "Prompt", "Score", "Session", "as_batch"]

Message = Mapping[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]
"""Text completed as it stands, messages for the chat template, or token ids."""


@dataclass(frozen=True)
class Generation:
    """A finished text and what it took. `steps` counts forward passes that emitted tokens, the prompt's last included.

    `finish_reason` is "stop" (an end token or a stop string) or "length". `note` says what the strategy decided.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    steps: int
    seconds: float
    finish_reason: str
    decoding: str
    logprobs: list[float] | None = None
    note: str | None = None

    @property
    def tokens_per_step(self) -> float:
        """Emitted tokens per forward pass; 1 in plain decoding."""
        return len(self.token_ids) / self.steps

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens per second, prompt included in the time."""
        return len(self.token_ids) / self.seconds

    @property
    def summary(self) -> str:
        """What it took, in one line."""
        return (
            f"{len(self.token_ids)} tokens in {self.steps} steps ({self.tokens_per_step:.2f} tokens/step), "
            f"{self.tokens_per_second:.1f} tokens/s, {self.decoding}"
        )

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain data, for JSON; `logprobs` and `note` only where there are any."""
        fields = {
            "text": self.text,
            "token_ids": self.token_ids,
            "prompt_tokens": self.prompt_tokens,
            "steps": self.steps,
            "tokens_per_step": round(self.tokens_per_step, 4),
            "seconds": round(self.seconds, 4),
            "tokens_per_second": round(self.tokens_per_second, 3),
            "decoding": self.decoding,
            "finish_reason": self.finish_reason,
        }
        optional = {"logprobs": self.logprobs, "note": self.note}
        return fields | {name: value for name, value in optional.items() if value is not None}


@dataclass(frozen=True)
class Piece:
    """One token of a stream. `text` may be empty where a character or a stop string is not decided yet.

    `drafted` tokens were accepted beyond the first of their step. `index` is the prompt's, in a batch. `trace`, on a
    step's first token, counts the step's drafted and accepted rows by source. The last piece of a prompt has the
    finished `generation`.
    """

    text: str
    token_id: int
    index: int
    step: int
    drafted: bool
    logprob: float | None = None
    trace: Mapping[str, tuple[int, int]] | None = None
    generation: Generation | None = None


@dataclass(frozen=True)
class Score:
    """How likely the model finds a text: log-probability of each token after the first, in nats."""

    token_ids: list[int]
    logprobs: list[float]

    @property
    def mean_logprob(self) -> float:
        """Nats per predicted token."""
        return sum(self.logprobs) / len(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp(-mean_logprob)."""
        return math.exp(-self.mean_logprob)


class Session:
    """One call of `generate` or `stream`: its requests, and what they become. Options as for `LanguageModel.stream`."""

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        environment: DraftingEnvironment,
        *,
        eos_ids: Sequence[int],
        slots: int,
        decoding: str | Decoding | Drafter = "auto",
        max_new_tokens: int = 256,
        stop: str | Sequence[str] = (),
        logprobs: bool = False,
        **sampling_options: Any,
    ) -> None:
        self._runner, self._slots, self._logprobs = runner, slots, logprobs
        settings = as_decoding(decoding)
        self.decoding = describe(settings)
        self.note: str | None = None
        if isinstance(settings, Drafter) and len(prompts) > 1:
            raise RequestError(
                "one drafter object cannot serve a batch, as it keeps one sequence's state; "
                "generate one prompt at a time"
            )
        for prompt in prompts:
            check_prompt(runner, prompt)
        stops = [stop] if isinstance(stop, str) else list(stop)
        self._stop_checker = partial(StopChecker, tokenizer, eos_ids, max_new_tokens, stops)
        self._stop_checker()  # what is wrong with the options is said before work begins
        self._sampling = SamplingOptions(**sampling_options)
        self._settings, self._environment = settings, environment
        self._prompts = [list(prompt) for prompt in prompts]
        self._began: list[float] = []

    def pieces(self) -> Iterator[Piece]:
        """Decode; tokens in the order in which steps emit them."""
        emitted: dict[int, list[Emission]] = {}
        for emission in decode(self._runner, self._requests(), self._slots):
            index = emission.request
            emitted.setdefault(index, []).append(emission)
            yield Piece(
                text=emission.text,
                token_id=emission.token,
                index=index,
                step=emission.step,
                drafted=emission.drafted,
                logprob=emission.logprob,
                trace=emission.draft,
                generation=self._generation(index, emitted.pop(index)) if emission.finish_reason else None,
            )

    def generations(self) -> Iterator[tuple[int, Generation]]:
        """Decode; each finished text with its prompt's index, in the order in which they end."""
        for piece in self.pieces():
            if piece.generation is not None:
                yield piece.index, piece.generation

    def _requests(self) -> Iterator[Request]:
        """Requests, each made when a slot is free for it."""
        settings, samples = self._settings, Counter[tuple[int, ...]]()
        for prompt in self._prompts:
            # The same prompt again is another sample of it.
            sampling = replace(self._sampling, sample=self._sampling.sample + samples[tuple(prompt)])
            samples[tuple(prompt)] += 1
            drafter = (
                settings if isinstance(settings, Drafter) else settings.drafter(self._environment, sampling)
            )
            if isinstance(settings, Auto) and drafter is None:
                self.note = "auto decodes plainly here: further rows cost too much on this machine to pay off"
            self._began.append(time.perf_counter())
            yield Request(
                prompt=prompt,
                sampling=sampling,
                stopping=self._stop_checker(),
                drafter=drafter,
                logprobs=self._logprobs,
            )

    def _generation(self, index: int, emissions: list[Emission]) -> Generation:
        last = emissions[-1]
        return Generation(
            text="".join(emission.text for emission in emissions),
            token_ids=[emission.token for emission in emissions],
            prompt_tokens=len(self._prompts[index]),
            steps=last.step + 1,
            seconds=time.perf_counter() - self._began[index],
            finish_reason=last.finish_reason or "length",
            decoding=self.decoding,
            logprobs=[e.logprob for e in emissions if e.logprob is not None] if self._logprobs else None,
            note=self.note,
        )


def as_batch(prompt: Any) -> tuple[list[Prompt], bool]:
    """The prompts as a list, and whether there was just one."""
    prompt = _plain(prompt)
    if isinstance(prompt, str):
        return [prompt], True
    if not isinstance(prompt, Sequence):
        raise RequestError(
            f"the prompt is a {type(prompt).__name__}; give a text, messages, token ids, or a list of these"
        )
    if not prompt:
        raise RequestError("the prompt is empty; give a text, messages, token ids, or a list of these")
    prompts = [_plain(item) for item in prompt]
    single = isinstance(prompts[0], Mapping | int)
    return ([prompts], True) if single else (prompts, False)


def _plain(value: Any) -> Any:
    """Tensors and arrays as lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else value
