"""Lookahead decoding inside transformers: `model.generate(..., custom_generate=shoestring.custom_generate)`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shoestring.decoding.decode import Request, decode
from shoestring.decoding.drafters.protocol import Drafter
from shoestring.decoding.look_ahead import Base, load_look_ahead
from shoestring.decoding.settings import Decoding, DraftingEnvironment, as_decoding
from shoestring.engine.sampling import SamplingOptions
from shoestring.errors import RequestError
from shoestring.model import LanguageModel

__all__ = ["custom_generate"]

# Processors that `SamplingOptions` covers: its option, and the processor's attribute that holds it.
_PROCESSORS = {
    "TemperatureLogitsWarper": ("temperature", "temperature"),
    "TopKLogitsWarper": ("top_k", "top_k"),
    "TopPLogitsWarper": ("top_p", "top_p"),
    "MinPLogitsWarper": ("min_p", "min_p"),
    "RepetitionPenaltyLogitsProcessor": ("repetition_penalty", "penalty"),
}


def custom_generate(
    model: Any,
    input_ids: Tensor,
    *,
    logits_processor: Any = (),
    stopping_criteria: Any = (),
    generation_config: Any = None,
    decoding: str | Decoding | Drafter = "lookahead",
    look_ahead: str | None = None,
    **kwargs: Any,
) -> Any:
    """Decode an already loaded HF model with one of our strategies; same tokens as `generate` without it, greedy.

    Pass it to transformers' own `generate`, with `decoding=` if not lookahead, and `look_ahead=` embeddings for PaSS:

        model.generate(**inputs, max_new_tokens=100, custom_generate=shoestring.custom_generate, decoding="auto")

    Sampling draws our noise, seeded from torch's generator (`torch.manual_seed`). `input_ids` are [B, T], left-padded
    under `attention_mask`; returned are [B, T + new], right-padded. For stop strings pass a `StopStringCriteria`:
    transformers loses the tokenizer that `stop_strings=` needs.

    Raises:
        RequestError: beams, constraints, a logits processor that a decoding step over a tree cannot honour, or
            look-ahead embeddings of another model.
    """
    if generation_config is None:
        raise RequestError("call it through generate(custom_generate=shoestring.custom_generate)")
    _refuse_unknown(logits_processor, generation_config)
    embeddings = load_look_ahead(look_ahead, Base.of_module(model), type(model).__name__)
    language_model = LanguageModel(model, look_ahead=embeddings)
    try:
        settings = as_decoding(decoding)
        if isinstance(settings, Drafter) and input_ids.shape[0] > 1:
            raise RequestError("one drafter object cannot serve a batch, as it keeps one sequence's state")
        environment = DraftingEnvironment(language_model.step_cost, language_model.draft_runner, embeddings)
        # Not a named parameter: transformers would then pass it twice.
        prompts = _unpadded(input_ids, kwargs.get("attention_mask"))
        seed = int(torch.randint(1 << 62, ())) if generation_config.do_sample else 0
        requests = []
        for index, prompt in enumerate(prompts):
            sampling = _sampling(logits_processor, generation_config, seed, index)
            drafter = settings if isinstance(settings, Drafter) else settings.drafter(environment, sampling)
            stopping = _Stopping(input_ids[index], stopping_criteria)
            requests.append(Request(prompt=prompt, sampling=sampling, stopping=stopping, drafter=drafter))
        outputs: list[list[int]] = [[] for _ in prompts]
        for emission in decode(language_model.runner, requests):
            outputs[emission.request].append(emission.token)
    finally:
        language_model.close()
    return _as_output(input_ids, outputs, generation_config)


class _Stopping:
    """transformers' stopping criteria, asked token by token."""

    def __init__(self, row: Tensor, criteria: Any) -> None:
        from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

        # These two, on nearly every call, need no look at the whole sequence. max_length counts the padded prompt.
        ends = [criterion.eos_token_id for criterion in criteria if type(criterion) is EosTokenCriteria]
        longest = [criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria]
        self._eos = frozenset(token for tokens in ends for token in tokens.flatten().tolist())
        self._most = min(longest, default=1 << 62) - row.shape[0]
        self._criteria = [
            criterion
            for criterion in criteria
            if type(criterion) not in (EosTokenCriteria, MaxLengthCriteria)
        ]
        self._tokens = row.tolist() if self._criteria else []
        self._device = row.device
        self.count = 0
        self.finish_reason: str | None = None

    def push(self, token: int) -> str:
        """Add an emitted token; sets `finish_reason` where the sequence ends."""
        self.count += 1
        if token in self._eos:
            self.finish_reason = "stop"
        elif self.count >= self._most:
            self.finish_reason = "length"
        elif self._criteria:
            self._tokens.append(token)
            ids = torch.tensor([self._tokens], device=self._device)
            if any(bool(criterion(ids, None)[0]) for criterion in self._criteria):
                self.finish_reason = "stop"
        return ""

    def foresee(self, tokens: Sequence[int]) -> tuple[int, str | None] | None:
        """Criteria of other kinds are asked token by token."""
        return None

    def end(self, reason: str) -> str:
        """End the sequence from outside."""
        self.finish_reason = reason
        return ""


def _refuse_unknown(logits_processor: Any, config: Any) -> None:
    for processor in logits_processor or ():
        name = type(processor).__name__
        if name not in _PROCESSORS:
            raise RequestError(f"{name} is not supported in custom_generate; leave its option out")
        if getattr(processor, "prompt_ignore_length", None):
            raise RequestError("prompt_ignore_length is not supported in custom_generate; leave it out")
    for option, plain in (("num_beams", 1), ("penalty_alpha", None), ("constraints", None)):
        if getattr(config, option, plain) not in (plain, None, 0):
            raise RequestError(f"{option}={getattr(config, option)} is not supported in custom_generate")
    for option in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, option, False):
            raise RequestError(
                f"{option} is not supported in custom_generate; LanguageModel.score gives scores"
            )


def _sampling(processors: Any, config: Any, seed: int, sample: int) -> SamplingOptions:
    options: dict[str, Any] = {"temperature": 1.0}
    for processor in processors or ():
        option, attribute = _PROCESSORS[type(processor).__name__]
        options[option] = getattr(processor, attribute)
    if not config.do_sample:
        options["temperature"] = 0.0
    return SamplingOptions(**options, seed=seed, sample=sample)


def _unpadded(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    if attention_mask is None:
        rows: list[list[int]] = input_ids.tolist()
        return rows
    if attention_mask.shape != input_ids.shape:
        raise RequestError(
            f"the attention mask is {list(attention_mask.shape)}; custom_generate takes one like the input ids, "
            f"{list(input_ids.shape)}"
        )
    return [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]


def _as_output(input_ids: Tensor, outputs: list[list[int]], config: Any) -> Any:
    longest = max(map(len, outputs))
    pad = config.pad_token_id
    if pad is None:
        eos = config.eos_token_id
        pad = eos[0] if isinstance(eos, list | tuple) else eos or 0
    padded = [output + [pad] * (longest - len(output)) for output in outputs]
    new = torch.tensor(padded, dtype=input_ids.dtype, device=input_ids.device)
    sequences: Any = torch.cat([input_ids, new], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=sequences)
