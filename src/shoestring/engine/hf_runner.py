"""Any Hugging Face causal language model as a runner, on any device: the plain twin of all faster bodies."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from shoestring.engine import admission
from shoestring.engine.attention import StepLayout, active_step, additive_mask, register_attention
from shoestring.engine.kvcache import KVCache
from shoestring.engine.results import SlotResults
from shoestring.engine.runner import NEXT_TOKENS, Outputs, PlainSteps, RowResults, StepResult, check_step
from shoestring.engine.sampling import SamplingOptions
from shoestring.engine.tokentree import TokenTree
from shoestring.errors import RequestError

__all__ = ["HFRunner"]


class HFRunner(PlainSteps):
    """Runs an unmodified HF model over token trees.

    The model's attention is switched to tree attention, which is transformers' SDPA outside our steps; `close`
    switches it back. A model whose attention cannot be switched computes its own under a ready-made mask.

    Raises:
        UnsupportedModelError: the engine would not be right on this architecture.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        register_attention()
        admission.check_architecture(model)
        self.model = model
        self._original_attention: str = admission.text_config(model)._attn_implementation
        self._own_attention = admission.computes_own_attention(model)
        self._limit = admission.max_positions(model)
        self._closed = False
        try:
            planes = admission.probe(model, self._original_attention)
        except BaseException:
            self._restore_attention()
            raise
        self.cache = KVCache(planes, self._limit)
        self._vocab_size = int(admission.text_config(model).vocab_size)
        self._embedding = model.get_input_embeddings()  # type: ignore[operator]
        self._device: torch.device = self._embedding.weight.device
        self._selects_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._sampling: dict[int, SamplingOptions] = {}
        self._trees: dict[int, TokenTree] = {}

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits."""
        return self._vocab_size

    @property
    def max_positions(self) -> int | None:
        """The most positions the model can be right on."""
        return self._limit

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        dtype: torch.dtype = self.model.dtype  # type: ignore[assignment]
        return dtype

    @property
    def parameters(self) -> int:
        """How many numbers the weights hold."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def weights(self) -> str:
        """How the matrices are stored."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def description(self) -> str:
        """What runs."""
        return f"transformers' modules on {self._device}"

    @property
    def slots(self) -> Collection[int]:
        """The slots that are open."""
        return self._sampling.keys()

    def open(self, slot: int, sampling: SamplingOptions, prompt: Sequence[int] = ()) -> int:
        """Open a slot; return how many of the prompt's first tokens are cached already."""
        if self._closed:
            raise RequestError("the model was closed, and has its own attention back; load it again")
        cached = self.cache.open(slot, prompt)
        self._sampling[slot] = sampling
        return cached

    def step(self, trees: Mapping[int, TokenTree], want: Outputs = NEXT_TOKENS) -> StepResult:
        """One forward pass over the slots' trees, packed into one sequence."""
        cached = {slot: self.cache.length(slot) for slot in trees}
        check_step(trees, cached, self._limit)
        for slot, tree in trees.items():
            self.cache.reserve(slot, len(tree))
        layout = StepLayout.pack(trees, cached, self._device)
        rows = {slot: want.rows_of(slot, tree) for slot, tree in trees.items()}
        kept = [segment.first_row + row for segment in layout.segments for row in rows[segment.slot]]
        arguments = self._inputs(trees)
        if self._own_attention:
            arguments["attention_mask"] = additive_mask(layout, self.model.dtype)  # type: ignore[arg-type]
        everything = len(kept) == layout.total_rows
        if self._selects_rows and not everything:
            # At least one row: some models take an empty selection for all of them.
            arguments["logits_to_keep"] = torch.tensor(kept or [0], device=self._device)
        with torch.inference_mode(), active_step(layout):
            output = self.model(
                position_ids=layout.positions,
                past_key_values=self.cache,
                use_cache=True,
                return_dict=True,
                output_hidden_states=bool(want.hidden_states),
                **arguments,
            )
            logits = output.logits[0]
            if not self._selects_rows and not everything:
                logits = logits[torch.tensor(kept, dtype=torch.long, device=logits.device)]
            hidden = {layer: output.hidden_states[layer][0] for layer in want.hidden_states}
        self._trees = dict(trees)
        results: dict[int, RowResults] = {}
        first = 0
        for segment in layout.segments:
            slot, count = segment.slot, len(rows[segment.slot])
            results[slot] = SlotResults(
                trees[slot],
                rows[slot],
                logits[first : first + count],
                {layer: states[segment.first_row :] for layer, states in hidden.items()},
                self._sampling[slot],
                segment.cached,
                self.cache.tokens(slot),
                want.top_k,
            )
            first += count
        return results

    def commit(self, paths: Mapping[int, Sequence[int]]) -> None:
        """Keep these rows of the last step."""
        for slot, rows in paths.items():
            tree = self._trees[slot]
            self.cache.commit(slot, [tree.tokens[row] for row in rows], rows)

    def rewind(self, slot: int, length: int) -> None:
        """Drop all cached tokens beyond the first `length`."""
        self.cache.rewind(slot, length)

    def release(self, slot: int) -> None:
        """Close a slot; its cache is kept for a prompt that continues it."""
        self.cache.release(slot)
        self._sampling.pop(slot)
        self._trees.pop(slot, None)

    def clear(self) -> None:
        """Drop what is kept of released slots."""
        self.cache.clear()

    def close(self) -> None:
        """Switch the model back to the attention it came with and drop the cache."""
        self._closed = True
        self._restore_attention()
        self.cache.clear()

    def _restore_attention(self) -> None:
        if not self._own_attention:
            admission.switch_attention(self.model, self._original_attention)

    def _inputs(self, trees: Mapping[int, TokenTree]) -> dict[str, Any]:
        tokens = [max(token, 0) for tree in trees.values() for token in tree.tokens]
        input_ids = torch.tensor([tokens], device=self._device)
        if not any(tree.embeddings for tree in trees.values()):
            return {"input_ids": input_ids}
        with torch.inference_mode():
            embeddings = self._embedding(input_ids).clone()
            rows: list[int] = []
            vectors: list[torch.Tensor] = []
            first = 0
            for tree in trees.values():
                for row, vector in (tree.embeddings or {}).items():
                    rows.append(first + row)
                    vectors.append(vector.to(embeddings))
                first += len(tree)
            embeddings[0, rows] = torch.stack(vectors)
        return {"inputs_embeds": embeddings}
