"""`generate`, `stream` and `score` with a model, whatever strategy decodes and whatever body runs it."""

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast, overload

import numpy as np
import torch

from shoestring import hub
from shoestring.decoding.decode import check_prompt
from shoestring.decoding.drafters.datastore import Datastore
from shoestring.decoding.drafters.protocol import Drafter
from shoestring.decoding.look_ahead import LookAhead
from shoestring.decoding.own_texts import bundled_texts, remembered_texts, write_texts
from shoestring.decoding.settings import Decoding, DraftingEnvironment
from shoestring.decoding.successors import remembered_successors
from shoestring.decoding.tune import StepCost, fingerprint, remembered_step_cost
from shoestring.engine.hf_runner import HFRunner
from shoestring.engine.runner import Outputs, Runner
from shoestring.engine.sampling import SamplingOptions
from shoestring.engine.tokentree import TokenTree
from shoestring.errors import RequestError, suggest
from shoestring.generation import Generation, Message, Piece, Prompt, Score, Session, as_batch
from shoestring.hub.cache import Progress
from shoestring.model.templates import around_words, encode_messages, has_template

__all__ = ["LanguageModel"]

_SCORE_SLOT = -2
_SCORE_CHUNK = 256


class LanguageModel:
    """A causal language model behind the engine. `load` makes one; so does any HF model already in memory.

    Args:
        model: the HF module, unmodified; `close` gives it its own attention back. None where `runner` needs none.
        tokenizer, name: transformers' tokenizer, or None to work with token ids only; a name for messages.
        slots: the most sequences in one step.
        progress: called as ("measure", done, total) while the cost of steps is timed, and "write" while the model writes
            the texts that drafts come from.
        runner: the body that runs the model; None: an `HFRunner`, which changes the module's attention.
        look_ahead: embeddings for PaSS, checked against the model already.
        config, generation_config: the module's own unless given.
        dtype: what `load` was asked for; draft models are loaded alike.
        load_module: makes the HF module where someone asks for it and none is in memory.
    """

    def __init__(
        self,
        model: torch.nn.Module | None,
        tokenizer: Any = None,
        *,
        name: str = "model",
        slots: int = 8,
        progress: Progress | None = None,
        runner: Runner | None = None,
        look_ahead: LookAhead | None = None,
        config: Any = None,
        generation_config: Any = None,
        dtype: str | None = None,
        load_module: Callable[[], torch.nn.Module] | None = None,
    ) -> None:
        if runner is None and model is None:
            raise RequestError("a language model needs a module, or a runner that needs none")
        self.tokenizer, self.name = tokenizer, name
        self.config: Any = config if model is None else model.config
        self.runner: Runner = runner or HFRunner(cast(torch.nn.Module, model))
        self._module, self._load_module, self._dtype = model, load_module, dtype
        self._generation_config = generation_config or getattr(model, "generation_config", None)
        self.look_ahead = look_ahead and look_ahead.placed(self.device, self.dtype)
        self._slots, self._progress = slots, progress
        self._step_cost: StepCost | None = None
        self._successors: np.ndarray | None = None
        self._datastore: Datastore | None = None
        self._draft_runners: dict[str, Runner] = {}
        self._drafting: DraftingEnvironment | None = None

    def __repr__(self) -> str:
        return f"LanguageModel({self.name!r}, {self.runner.weights}, {self.device})"

    @property
    def model(self) -> torch.nn.Module:
        """The HF module; where the native step runs the files themselves, it is loaded beside them when first asked for.

        Raises:
            RequestError: there is none.
        """
        if self._module is None:
            if self._load_module is None:
                raise RequestError(f"{self.name} has no HF module")
            self._module = self._load_module()
        return self._module

    @property
    def dtype(self) -> torch.dtype:
        """The type that activations are computed in, or rounded to between layers."""
        return self.runner.dtype

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.runner.device

    @property
    def slots(self) -> int:
        """The most sequences that are decoded at once; more prompts wait for a free slot."""
        return self._slots

    @property
    def eos_ids(self) -> list[int]:
        """All token ids that end a text: the generation config's and the tokenizer's."""
        ids = getattr(self._generation_config, "eos_token_id", None)
        found = list(ids) if isinstance(ids, list | tuple) else [ids]
        found.append(getattr(self.tokenizer, "eos_token_id", None))
        return sorted({int(token) for token in found if token is not None})

    @property
    def description(self) -> str:
        """The model, its parameters, how they are stored and which body runs it."""
        runner = self.runner
        return (
            f"{self.name}: {runner.parameters / 1e6:,.0f}M parameters, {runner.weights}, {runner.description}"
        )

    @property
    def has_chat_template(self) -> bool:
        """Whether messages can be given."""
        return has_template(self.tokenizer)

    @property
    def generation_defaults(self) -> dict[str, Any]:
        """Sampling settings that the model's makers recommend in its generation config; greedy if it samples not."""
        config = self._generation_config
        if config is None or not config.do_sample:
            return {}
        names = ("temperature", "top_k", "top_p", "repetition_penalty")
        found = {name: getattr(config, name, None) for name in names}
        return {"temperature": 1.0} | {name: value for name, value in found.items() if value is not None}

    @overload
    def generate(self, prompt: str | Sequence[Message] | Sequence[int], **options: Any) -> Generation: ...

    @overload
    def generate(
        self, prompt: Sequence[str] | Sequence[Sequence[Message]] | Sequence[Sequence[int]], **options: Any
    ) -> list[Generation]: ...

    def generate(self, prompt: Any, **options: Any) -> Generation | list[Generation]:
        """Generate to the end. Options as for `stream`; a list of prompts gives a list of `Generation`s.

        Example:
            >>> model.generate("The capital of France is", max_new_tokens=8).text
        """
        prompts, single = as_batch(prompt)
        finished = dict(self._session(prompts, options).generations())
        return finished[0] if single else [finished[index] for index in range(len(prompts))]

    def generate_each(self, prompts: Sequence[Prompt], **options: Any) -> Iterator[tuple[int, Generation]]:
        """Generate for many prompts; yield (index, Generation) as each ends. Options as for `stream`."""
        return self._session(list(prompts), options).generations()

    def stream(
        self,
        prompt: Any,
        *,
        decoding: str | Decoding | Drafter = "auto",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        logprobs: bool = False,
    ) -> Iterator[Piece]:
        """Generate token by token.

        Args:
            prompt: text (completed as it stands), messages (the tokenizer's chat template), token ids, or a list
                of any of these.
            decoding: "autoregressive", "lookahead", "ngram", "draft_model(model=...)", "pass", "auto", a settings
                object, or a `Drafter` of your own. Every strategy gives the same tokens for the same seed.
            max_new_tokens: the most tokens of each text.
            temperature, top_k, top_p, min_p, repetition_penalty, seed: see `SamplingOptions`; 0 is greedy.
            stop: strings that end the text, left out of it.
            logprobs: also return each token's log-probability (unwarped).

        Raises:
            RequestError: an empty prompt, one over the context, or a value out of range.
        """
        prompts, _ = as_batch(prompt)
        options = {
            "decoding": decoding,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "stop": stop,
            "seed": seed,
            "logprobs": logprobs,
        }
        return self._session(prompts, options).pieces()

    def score(self, text: str | Sequence[int]) -> Score:
        """Log-probability of each of a text's tokens after the first.

        Raises:
            RequestError: fewer than two tokens, or more than the context holds.
        """
        prompts, single = as_batch(text)
        if not single:
            raise RequestError("score takes one text at a time")
        tokens = self.encode(prompts[0])
        limit = self.runner.max_positions
        if len(tokens) < 2:
            raise RequestError(f"scoring needs at least two tokens; this text has {len(tokens)}")
        if limit is not None and len(tokens) > limit:
            raise RequestError(
                f"the text has {len(tokens)} tokens and the model's context {limit}; shorten it"
            )
        logprobs: list[float] = []
        runner = self.runner
        runner.open(_SCORE_SLOT, SamplingOptions())
        try:
            for start in range(0, len(tokens) - 1, _SCORE_CHUNK):
                chunk = tokens[start : min(start + _SCORE_CHUNK, len(tokens) - 1)]
                results = runner.step({_SCORE_SLOT: TokenTree.chain(chunk)}, Outputs(logits=True))[
                    _SCORE_SLOT
                ]
                following = tokens[start + 1 : start + 1 + len(chunk)]
                logprobs.extend(results.log_probability(row, token) for row, token in enumerate(following))
                runner.commit({_SCORE_SLOT: range(len(chunk))})
        finally:
            runner.release(_SCORE_SLOT)
        return Score(tokens, logprobs)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text (with the tokenizer's special tokens), of messages (chat template), or as given.

        Raises:
            RequestError: an empty prompt, an unknown token id, no tokenizer, no chat template, or a malformed message.
        """
        if not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt):
            tokens = [int(token) for token in prompt]  # type: ignore[arg-type]
            size = self.runner.vocab_size
            bad = next((token for token in tokens if not 0 <= token < size), None)
            if bad is not None:
                raise RequestError(f"token id {bad} is not in the model's vocabulary of {size}")
        elif self.tokenizer is None:
            raise RequestError(f"{self.name} has no tokenizer; give token ids instead of text")
        elif isinstance(prompt, str):
            tokens = list(self.tokenizer(prompt)["input_ids"])
        else:
            tokens = encode_messages(self.tokenizer, prompt, self.name)
        if not tokens:
            raise RequestError("the prompt is empty; give it at least one token")
        return tokens

    def check(self, tokens: list[int]) -> list[int]:
        """Return the token ids of a prompt if the model can decode from them.

        Raises:
            RequestError: they leave no room in the context, or are not in the vocabulary.
        """
        check_prompt(self.runner, tokens)
        return tokens

    def step_cost(self, anew: bool = False) -> StepCost:
        """Seconds of a step by its rows: measured once per model and machine, then remembered in the cache.

        Args:
            anew: measure it now, whatever is remembered: the machine may have been busy then.
        """
        if self._step_cost is None or anew:
            path = hub.cache_root() / "step-cost" / f"{self._fingerprint()}.json"
            report = functools.partial(self._progress, "measure") if self._progress else None
            self._step_cost = remembered_step_cost(self.runner, path, report, anew)
        return self._step_cost

    def successors(self) -> np.ndarray | None:
        """What the model finds likely after each token alone: measured once per model and machine, then remembered."""
        if self._successors is None:
            path = hub.cache_root() / "successors" / f"{self._fingerprint()}.npy"
            report = functools.partial(self._progress, "measure") if self._progress else None
            self._successors = remembered_successors(self.runner, self._first_token, path, report)
        return self._successors

    def datastore(self, seconds: float | None = None) -> Datastore | None:
        """Texts that the model writes by itself, which `auto` drafts from: written once, then remembered in the cache.

        None for a model too slow to write many in the time. Those of a bundled model come with the package.

        Args:
            seconds: write anew, for so long; None: 6 seconds, where none are remembered.
        """
        if self._datastore is None or seconds is not None:
            texts = bundled_texts(self.name) if seconds is None else None
            if texts is None or texts.max(initial=0) >= self.runner.vocab_size:
                # Other weights of the same shape show in the successors.
                known = self.successors()
                mark = hashlib.sha256(b"" if known is None else known.tobytes()).hexdigest()[:12]
                path = hub.cache_root() / "own-texts" / f"{self._fingerprint()}-{mark}.npy"
                write = functools.partial(self._write_texts, seconds)
                if known is not None and not len(known) and seconds is None:
                    texts = np.empty(0, np.int32)  # too slow to look at its vocabulary is too slow to write
                else:
                    texts = remembered_texts(path, self.runner.vocab_size, write, anew=seconds is not None)
            self._datastore = Datastore(texts)
        return self._datastore if len(self._datastore) else None

    def _write_texts(self, seconds: float | None) -> np.ndarray:
        report = functools.partial(self._progress, "write") if self._progress else None
        opening, ending = self.chat_frame()
        return write_texts(self.runner, opening, ending, self.eos_ids, seconds, progress=report)

    def chat_frame(self) -> tuple[list[int], list[int] | None]:
        """The tokens in front of a user's words and those behind them; without a chat format, a first token."""
        return around_words(self.tokenizer) or ([self._first_token], None)

    @property
    def _first_token(self) -> int:
        """What a text without a prompt begins with."""
        ids = [getattr(self.tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")]
        return next((token for token in ids if token is not None), 0)

    def warm_up(self, batch: int = 1) -> None:
        """Compile now what the first steps of at most `batch` sequences would wait for (on a GPU; elsewhere nothing)."""
        report = functools.partial(self._progress, "warm up") if self._progress else None
        self.runner.warm_up(batch, report)

    def forget(self) -> None:
        """Drop what is kept of ended texts; the next prompt that begins like one of them runs in full."""
        self.runner.clear()

    def close(self) -> None:
        """Drop the cache and give the HF module its own attention back."""
        for runner in [self.runner, *self._draft_runners.values()]:
            runner.close()

    def _session(self, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> Session:
        known = list(inspect.signature(self.stream).parameters)[1:]
        for option in options:
            if option not in known:
                raise RequestError(f"unknown option {option!r}{suggest(option, known)}")
        return Session(
            self.runner,
            self.tokenizer,
            [self.encode(prompt) for prompt in prompts],
            self._drafting_environment(),
            eos_ids=self.eos_ids,
            slots=self._slots,
            **options,
        )

    def _drafting_environment(self) -> DraftingEnvironment:
        """What drafters need: one for all requests with the same look-ahead embeddings, so that they learn together."""
        if self._drafting is None or self._drafting.look_ahead is not self.look_ahead:
            self._drafting = DraftingEnvironment(
                self.step_cost, self.draft_runner, self.look_ahead, self.successors, self.datastore
            )
        return self._drafting

    def draft_runner(self, name: str) -> Runner:
        """The runner of a smaller model that drafts for this one.

        Raises:
            RequestError: the two models' tokenizers differ.
        """
        from shoestring.model.loading import load

        if name not in self._draft_runners:
            small = load(name, device=str(self.device), dtype=self._dtype or str(self.dtype).split(".")[1])
            ours, theirs = self.tokenizer, small.tokenizer
            if ours is None or theirs is None or ours.get_vocab() != theirs.get_vocab():
                raise RequestError(
                    f"the draft model {name!r} has another tokenizer than {self.name!r}; both must share one"
                )
            self._draft_runners[name] = small.runner
        return self._draft_runners[name]

    def _fingerprint(self) -> str:
        return fingerprint(self.runner, self.config.to_dict(), str(self.dtype), self.device)
