"""What generating gives (`Generation`, `Piece`, `Score`), and the session that turns one call into requests."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoestring.decoding.decode import Emission, Request, decode
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
    """A finished text and what it took. `steps` counts forward passes that emitted tokens, the prompt's last included."""

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


@dataclass(frozen=True)
class Piece:
    """One token of a stream. `text` may be empty where a character or a stop string is not decided yet.

    `drafted` tokens were accepted beyond the first of their step. `index` is the prompt's, in a batch. The last
    piece of a prompt has a `finish_reason`: "stop" or "length".
    """

    text: str
    token_id: int
    index: int
    step: int
    drafted: bool
    logprob: float | None = None
    finish_reason: str | None = None
    trace: Mapping[str, tuple[int, int]] | None = None


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
        stops = [stop] if isinstance(stop, str) else list(stop)
        self.requests = []
        for index, prompt in enumerate(prompts):
            tokens = list(prompt)
            # The same prompt again is another sample of it.
            sampling = SamplingOptions(**sampling_options, sample=list(prompts[:index]).count(prompt))
            stopping = StopChecker(tokenizer, eos_ids, max_new_tokens, stops)
            drafter = settings if isinstance(settings, Drafter) else settings.drafter(environment, sampling)
            if isinstance(settings, Auto) and drafter is None:
                self.note = "auto decodes plainly here: further rows cost too much on this machine to pay off"
            self.requests.append(
                Request(
                    prompt=tokens, sampling=sampling, stopping=stopping, drafter=drafter, logprobs=logprobs
                )
            )

    def emissions(self) -> Iterator[Emission]:
        """Decode; tokens in the order in which steps emit them."""
        return decode(self._runner, self.requests, self._slots)

    def pieces(self) -> Iterator[Piece]:
        """Decode; the public face of `emissions`."""
        for emission in self.emissions():
            yield Piece(
                text=emission.text,
                token_id=emission.token,
                index=emission.request,
                step=emission.step,
                drafted=emission.drafted,
                logprob=emission.logprob,
                finish_reason=emission.finish_reason,
                trace=emission.draft,
            )

    def generations(self) -> list[Generation]:
        """Decode all to the end."""
        began = time.perf_counter()
        ended = [0.0] * len(self.requests)
        emissions: list[list[Emission]] = [[] for _ in self.requests]
        for emission in self.emissions():
            emissions[emission.request].append(emission)
            ended[emission.request] = time.perf_counter() - began
        return [self._generation(index, emissions[index], ended[index]) for index in range(len(ended))]

    def _generation(self, index: int, emissions: list[Emission], seconds: float) -> Generation:
        last = emissions[-1]
        return Generation(
            text="".join(emission.text for emission in emissions),
            token_ids=[emission.token for emission in emissions],
            prompt_tokens=len(self.requests[index].prompt),
            steps=last.step + 1,
            seconds=seconds,
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
