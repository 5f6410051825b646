"""The decoding loop: draft, merge into one packed step, verify, commit, yield."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from shoestring.decoding.drafters.protocol import Context, Draft, Drafter, StepObservation
from shoestring.decoding.stopping import Stopping
from shoestring.decoding.verify import verify
from shoestring.engine.runner import Outputs, RowResults, Runner, free_slot
from shoestring.engine.sampling import SamplingOptions
from shoestring.engine.tokentree import NO_TOKEN, TokenTree
from shoestring.errors import RequestError

__all__ = ["Emission", "Request", "check_prompt", "decode"]

PREFILL_CHUNK = 512
"""Most prompt rows of a step, over all slots, so that a long prompt does not stall the others."""
MOST_DRAFT_ROWS = 1024


@dataclass(kw_only=True)
class Request:
    """One sequence to decode. `drafter` None is plain decoding."""

    prompt: list[int]
    sampling: SamplingOptions
    stopping: Stopping
    drafter: Drafter | None = None
    logprobs: bool = False


@dataclass(frozen=True)
class Emission:
    """A token of a request, in order. `text` may be empty (held back) or hold several tokens' text.

    `drafted` says that the token was accepted beyond the first of its step; `draft` is the step's trace, with its
    first token only.
    """

    request: int
    token: int
    text: str
    step: int
    drafted: bool
    logprob: float | None = None
    finish_reason: str | None = None
    draft: Mapping[str, tuple[int, int]] | None = None


@dataclass
class _Sequence:
    index: int
    request: Request
    slot: int
    context: Context
    pending: list[int]  # accepted tokens that are not in the cache yet
    steps: int = 0
    draft: Draft = field(default_factory=Draft)

    @property
    def cached(self) -> int:
        return len(self.context.tokens) - len(self.pending)


def decode(runner: Runner, requests: Iterable[Request], slots: int = 8) -> Iterator[Emission]:
    """Decode requests, at most `slots` at a time, and yield their tokens as steps produce them.

    A request is taken from the iterable when a slot is free for it. Closing the generator releases all slots.

    Raises:
        RequestError: an empty prompt, or one that leaves no room in the model's context.
    """
    waiting = enumerate(requests)
    active: list[_Sequence] = []
    try:
        while True:
            for index, request in islice(waiting, slots - len(active)):
                active.append(_open(runner, index, request))
            if not active:
                return
            for sequence, emissions in _step(runner, active):
                if emissions and emissions[-1].finish_reason:
                    active.remove(sequence)
                    _close(runner, sequence)
                yield from emissions
    finally:
        for sequence in active:
            _close(runner, sequence)


def check_prompt(runner: Runner, prompt: Sequence[int]) -> None:
    """Raise RequestError for a prompt that the runner cannot decode from."""
    if not prompt:
        raise RequestError("the prompt is empty; give it at least one token")
    limit = runner.max_positions
    if limit is not None and len(prompt) >= limit:
        raise RequestError(f"the prompt has {len(prompt)} tokens and the model's context {limit}; shorten it")
    bad = next((token for token in prompt if not 0 <= token < runner.vocab_size), None)
    if bad is not None:
        raise RequestError(f"token id {bad} is not in the model's vocabulary of {runner.vocab_size}")


def _open(runner: Runner, index: int, request: Request) -> _Sequence:
    prompt, slot = list(request.prompt), free_slot(runner)
    check_prompt(runner, prompt)
    reused = runner.open(slot, request.sampling, prompt)
    sequence = _Sequence(index, request, slot, Context(prompt, len(prompt)), prompt[reused:])
    if request.drafter is not None:
        try:
            request.drafter.begin(prompt)
        except BaseException:
            _close(runner, sequence)
            raise
    return sequence


def _close(runner: Runner, sequence: _Sequence) -> None:
    runner.release(sequence.slot)
    close = getattr(sequence.request.drafter, "close", None)
    if close is not None:
        close()


def _step(runner: Runner, active: list[_Sequence]) -> list[tuple[_Sequence, list[Emission]]]:
    """One forward pass over all active sequences; prompts enter in chunks."""
    trees: dict[int, TokenTree] = {}
    wanted: dict[int, list[int]] = {}
    roots: dict[int, int | None] = {}
    top_k = 0
    prefill = PREFILL_CHUNK
    for sequence in active:
        pending = sequence.pending
        if len(pending) > 1:
            if prefill <= 0:
                continue
            if len(pending) > prefill:
                trees[sequence.slot] = TokenTree.chain(pending[:prefill])
                wanted[sequence.slot], roots[sequence.slot] = [], None
                prefill = 0
                continue
            prefill -= len(pending)
        root = len(pending) - 1
        draft = sequence.draft = _propose(runner, sequence, len(active))
        trees[sequence.slot] = _tree(pending, draft)
        roots[sequence.slot] = root
        top_k = max(top_k, draft.top_k)
        nodes = range(len(draft)) if draft.wanted is None else draft.wanted
        wanted[sequence.slot] = [root, *(root + 1 + node for node in nodes)]
    logits = any(sequence.request.logprobs for sequence in active)
    results = runner.step(trees, Outputs(wanted, top_k=top_k, logits=logits))
    outcome = []
    paths: dict[int, list[int]] = {}
    observations: list[tuple[Drafter, StepObservation]] = []
    for sequence in active:
        slot = sequence.slot
        if slot not in trees:
            continue
        first = roots[slot]
        if first is None:
            paths[slot] = list(range(len(trees[slot])))
            del sequence.pending[: len(trees[slot])]
            continue
        read_only = {first + 1 + node for node in sequence.draft.read_only}
        path, emitted = verify(trees[slot], results[slot], first, read_only)
        emissions = _emit(runner, sequence, results[slot], path, emitted, first)
        kept = len(emissions)
        paths[slot] = [*range(first), *path[:kept]]
        sequence.context.tokens.extend(emitted[:kept])
        sequence.pending = emitted[kept - 1 : kept]
        sequence.steps += 1
        drafter = sequence.request.drafter
        if drafter is not None and not emissions[-1].finish_reason:
            accepted = [row - first - 1 for row in path[1:]]
            observations.append(
                (
                    drafter,
                    StepObservation(
                        sequence.context,
                        sequence.draft,
                        emitted,
                        accepted,
                        results[slot],
                        first + 1,
                        runner.settled,
                    ),
                )
            )
        outcome.append((sequence, emissions))
    for drafter, observation in observations:
        drafter.observe(observation)
    runner.commit(paths)
    return outcome


def _propose(runner: Runner, sequence: _Sequence, batch: int) -> Draft:
    drafter = sequence.request.drafter
    if drafter is None:
        return Draft()
    sequence.context.batch = batch
    proposed = drafter.propose(sequence.context, MOST_DRAFT_ROWS // batch)
    draft = proposed if isinstance(proposed, Draft) else Draft.of(proposed)
    limit = runner.max_positions
    if limit is not None:
        # The deepest row's position must stay inside the context.
        room = limit - len(sequence.context.tokens)
        if len(draft) > room and any(draft.depth(node) > room for node in range(len(draft))):
            draft = draft.clipped(room)
    vocabulary, embeddings = runner.vocab_size, draft.embeddings
    if embeddings or (draft.tokens and not (min(draft.tokens) >= 0 and max(draft.tokens) < vocabulary)):
        for node, token in enumerate(draft.tokens):
            # A row with an embedding has no token: it could be accepted with another row's keys and values.
            if token != NO_TOKEN if node in embeddings else not 0 <= token < vocabulary:
                name = getattr(drafter, "name", type(drafter).__name__)
                raise RequestError(
                    f"the drafter {name!r} proposed token {token}; the vocabulary has {vocabulary}"
                )
    return draft


def _tree(pending: list[int], draft: Draft) -> TokenTree:
    root = len(pending) - 1
    return TokenTree(
        [*pending, *draft.tokens],
        [*range(-1, root), *(root + 1 + parent for parent in draft.parents)],
        embeddings={root + 1 + node: vector for node, vector in draft.embeddings.items()} or None,
    )


def _emit(
    runner: Runner,
    sequence: _Sequence,
    results: RowResults,
    path: list[int],
    emitted: list[int],
    root: int,
) -> list[Emission]:
    """Emissions of one step, cut where the sequence ends."""
    request, emissions = sequence.request, []
    limit = runner.max_positions
    known = len(sequence.context.tokens)
    for offset, (row, token) in enumerate(zip(path, emitted, strict=True)):
        text = request.stopping.push(token)
        reason = request.stopping.finish_reason
        if reason is None and limit is not None and known + offset + 1 >= limit:
            text += request.stopping.end("length")
            reason = "length"
        emissions.append(
            Emission(
                request=sequence.index,
                token=token,
                text=text,
                step=sequence.steps,
                drafted=offset > 0,
                logprob=results.log_probability(row, token) if request.logprobs else None,
                finish_reason=reason,
                draft=_trace(sequence, path, root) if offset == 0 else None,
            )
        )
        if reason:
            break
    return emissions


def _trace(sequence: _Sequence, path: list[int], root: int) -> dict[str, tuple[int, int]]:
    """Rows drafted and accepted in this step, by source."""
    draft = sequence.draft
    owners, fallback = draft.owners, [getattr(sequence.request.drafter, "name", "drafter")]
    drafted: dict[str, int] = {}  # a Counter takes several times as long, at every step
    for node in range(len(draft)):
        for owner in owners.get(node, fallback):
            drafted[owner] = drafted.get(owner, 0) + 1
    taken = [owner for row in path[1:] for owner in owners.get(row - root - 1, fallback)]
    return {owner: (rows, taken.count(owner)) for owner, rows in drafted.items()}
