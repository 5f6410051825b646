"""The decoding loop: draft, merge into one packed step, verify, commit, yield."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from shoestring.decoding.drafters.protocol import NO_DRAFT, Context, Draft, Drafter, StepObservation
from shoestring.decoding.governor import Governor
from shoestring.decoding.stopping import Stopping
from shoestring.decoding.verify import verify
from shoestring.engine.runner import Outputs, Runner, StepResult, free_slot
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
    draft: Draft = field(default_factory=lambda: NO_DRAFT)
    governor: Governor | None = None
    """The drafter's."""

    @property
    def cached(self) -> int:
        return len(self.context.tokens) - len(self.pending)


@dataclass(slots=True)
class _Judged:
    """What a governor has said of a step, and is told of it."""

    drafts: bool
    asked: int = 0
    """Sequences that it holds for."""
    told: int = 0
    """Those of them that drafted and go on; the rest is what they gave and took."""
    tokens: int = 0
    rows: int = 0
    expected: float = 0.0


@dataclass
class _Flight:
    """A step that has been asked for: what each slot runs, and where its drafts hang."""

    trees: dict[int, TokenTree]
    roots: dict[int, int | None]
    """Each slot's row of the last accepted token; None: only a prompt's piece runs."""
    results: StepResult
    settled: bool
    judged: dict[Governor, _Judged]


@dataclass(slots=True)
class _Landed:
    """What a step gave a sequence; its text may still be to come."""

    sequence: _Sequence
    step: int
    tokens: list[int]
    trace: tuple[Draft, list[int], int]
    """The draft, the accepted path, its first row: what the trace is counted from."""
    reason: str | None
    texts: list[str] | None
    """None: told when they are given out, since the end needed no look at them."""
    logprobs: list[float] | None


def decode(runner: Runner, requests: Iterable[Request], slots: int = 8) -> Generator[Emission, None, None]:
    """Decode requests, at most `slots` at a time, and yield their tokens as steps produce them.

    A request is taken from the iterable when a slot is free for it. Closing the generator releases all slots. A runner
    that steps asynchronously works on the next step while tokens are given out.

    Raises:
        RequestError: an empty prompt, or one that leaves no room in the model's context.
    """
    waiting, more = enumerate(requests), True
    active: list[_Sequence] = []
    landed: list[_Landed] = []
    try:
        while True:
            # Who gives the next request may have waited for a text's end.
            if not runner.asynchronous or any(one.reason for one in landed):
                yield from _given_out(landed)
                landed = []
            while more and len(active) < slots:
                taken = next(waiting, None)
                if taken is None:
                    more = False
                else:
                    active.append(_open(runner, *taken))
            if not active:
                return
            try:
                flight = _launch(runner, active)
            except Exception:
                yield from _given_out(landed)  # they came before what failed
                raise
            yield from _given_out(landed)
            for governor in flight.judged:
                governor.judge()  # of the step before, while this one runs
            landed = _land(runner, active, flight)
            for one in landed:
                if one.reason:
                    active.remove(one.sequence)
                    _close(runner, one.sequence)
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
    sequence.governor = getattr(request.drafter, "governor", None)
    if sequence.governor is not None:
        sequence.governor.begins()
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


def _launch(runner: Runner, active: list[_Sequence]) -> _Flight:
    """Ask for one forward pass over all active sequences; prompts enter in chunks."""
    trees: dict[int, TokenTree] = {}
    wanted: dict[int, Sequence[int]] = {}
    roots: dict[int, int | None] = {}
    judged: dict[Governor, _Judged] = {}
    top_k, logits = 0, False
    prefill = PREFILL_CHUNK
    running: list[_Sequence] = []
    drafting: list[tuple[_Sequence, Drafter]] = []
    for sequence in active:
        pending = sequence.pending
        logits = logits or sequence.request.logprobs
        if len(pending) > 1:
            if prefill <= 0:
                continue
            if len(pending) > prefill:
                trees[sequence.slot] = TokenTree.chain(pending[:prefill])
                wanted[sequence.slot], roots[sequence.slot] = [], None
                prefill = 0
                continue
            prefill -= len(pending)
        running.append(sequence)
        sequence.draft = NO_DRAFT
        drafter, governor = sequence.request.drafter, sequence.governor
        if governor is not None:
            if sequence.context.reads_prompt:
                drafter = None  # drafts on it would not be judged, and rows add to many
            else:
                verdict = judged.get(governor)
                if verdict is None:
                    verdict = judged[governor] = _Judged(governor.drafts(len(active)))
                verdict.asked += 1
                if not verdict.drafts:
                    drafter = None
        if drafter is not None:
            drafting.append((sequence, drafter))
    if drafting:
        _propose(runner, drafting, len(active))
    for sequence in running:
        draft, root = sequence.draft, len(sequence.pending) - 1
        trees[sequence.slot] = draft.tree(sequence.pending)
        roots[sequence.slot] = root
        top_k = max(top_k, draft.top_k)
        if draft.wanted is None:
            wanted[sequence.slot] = range(root, root + 1 + len(draft))
        else:
            wanted[sequence.slot] = [root, *(root + 1 + node for node in draft.wanted)]
    results = runner.step(trees, Outputs(wanted, top_k=top_k, logits=logits))
    return _Flight(trees, roots, results, runner.settled, judged)


def _land(runner: Runner, active: list[_Sequence], flight: _Flight) -> list[_Landed]:
    """Verify what a step gave, let drafters see it, and commit what was accepted."""
    landed: list[_Landed] = []
    paths: dict[int, list[int]] = {}
    observations: list[tuple[Drafter, StepObservation]] = []
    for sequence in active:
        slot = sequence.slot
        if slot not in flight.trees:
            continue
        tree, first, results = flight.trees[slot], flight.roots[slot], flight.results[slot]
        if first is None:
            paths[slot] = list(range(len(tree)))
            del sequence.pending[: len(tree)]
            continue
        request, draft = sequence.request, sequence.draft
        read_only = draft.read_only and {first + 1 + node for node in draft.read_only}
        path, emitted = verify(tree, results, first, read_only)
        kept, reason, texts = _ending(runner, sequence, emitted)
        logprobs = None
        if request.logprobs:
            logprobs = [
                results.log_probability(row, token)
                for row, token in zip(path[:kept], emitted[:kept], strict=True)
            ]
        landed.append(
            _Landed(
                sequence, sequence.steps, emitted[:kept], (draft, path, first), reason, texts, logprobs
            )
        )  # fmt: skip
        paths[slot] = [*range(first), *path[:kept]]
        sequence.context.tokens.extend(emitted[:kept])
        sequence.pending = emitted[kept - 1 : kept]
        sequence.steps += 1
        if request.drafter is None or reason:
            continue
        if draft is NO_DRAFT and sequence.governor is not None:
            continue
        accepted = [row - first - 1 for row in path[1:]]
        seen = StepObservation(sequence.context, draft, emitted, accepted, results, first + 1)
        observations.append((request.drafter, seen))
        if sequence.governor is not None:
            verdict = flight.judged[sequence.governor]
            verdict.told += 1
            verdict.tokens += len(emitted)
            verdict.rows += 1 + len(draft)
            verdict.expected += len(emitted) if draft.expected is None else draft.expected
    for drafter, observation in observations:
        drafter.observe(observation)
    later = runner.asynchronous
    for governor, verdict in flight.judged.items():  # now: what observing took is the drafts' time, too
        counts = flight.settled and verdict.asked == len(active)
        if verdict.drafts:
            governor.ends(verdict.tokens, verdict.rows, verdict.expected, verdict.told, counts, later)
        else:
            governor.ends(verdict.asked, told=verdict.asked, counts=counts, later=later)
    runner.commit(paths)
    return landed


def _propose(runner: Runner, drafting: Sequence[tuple[_Sequence, Drafter]], batch: int) -> None:
    """Have drafters draft for the step: together, where they can and a device waits for them."""
    budget, limit, vocabulary = MOST_DRAFT_ROWS // batch, runner.max_positions, runner.vocab_size
    for sequence, _ in drafting:
        sequence.context.batch = batch
    kinds = {type(drafter) for _, drafter in drafting}
    together = None
    if runner.asynchronous and len(kinds) == 1 < len(drafting):
        together = getattr(kinds.pop(), "propose_together", None)
    proposals: Iterable[Draft | Sequence[Sequence[int]]]
    if together is not None:
        contexts = [sequence.context for sequence, _ in drafting]
        proposals = together([drafter for _, drafter in drafting], contexts, budget)
    else:
        proposals = (drafter.propose(sequence.context, budget) for sequence, drafter in drafting)
    for (sequence, drafter), proposed in zip(drafting, proposals, strict=True):
        sequence.draft = _checked(sequence, drafter, proposed, limit, vocabulary)


def _checked(
    sequence: _Sequence,
    drafter: Drafter,
    proposed: Draft | Sequence[Sequence[int]],
    limit: int | None,
    vocabulary: int,
) -> Draft:
    """What was proposed, as a draft that fits into the context and the vocabulary."""
    draft = proposed if isinstance(proposed, Draft) else Draft.of(proposed)
    if limit is not None:
        # The deepest row's position must stay inside the context.
        room = limit - len(sequence.context.tokens)
        if len(draft) > room and any(draft.depth(node) > room for node in range(len(draft))):
            draft = draft.clipped(room)
    if not draft.fits(vocabulary):
        wrong = next(
            token
            for node, token in enumerate(draft.tokens)
            if (token != NO_TOKEN if node in draft.embeddings else not 0 <= token < vocabulary)
        )
        name = getattr(drafter, "name", type(drafter).__name__)
        raise RequestError(f"the drafter {name!r} proposed token {wrong}; the vocabulary has {vocabulary}")
    return draft


def _ending(
    runner: Runner, sequence: _Sequence, emitted: list[int]
) -> tuple[int, str | None, list[str] | None]:
    """How many of the tokens are kept, why the sequence ends there, and their texts where those had to be looked at."""
    stopping = sequence.request.stopping
    known, limit = len(sequence.context.tokens), runner.max_positions
    room = len(emitted) if limit is None else min(len(emitted), limit - known)
    full = limit is not None and known + room >= limit
    foreseen = stopping.foresee(emitted[:room])
    if foreseen is not None:
        kept, reason = foreseen
        return kept, reason or ("length" if full and kept == room else None), None
    texts: list[str] = []
    for token in emitted[:room]:
        texts.append(stopping.push(token))
        if stopping.finish_reason:
            return len(texts), stopping.finish_reason, texts
    if full:
        texts[-1] += stopping.end("length")
    return room, stopping.finish_reason, texts


def _given_out(landed: list[_Landed]) -> Iterator[Emission]:
    """The emissions of a step."""
    for one in landed:
        request = one.sequence.request
        last = len(one.tokens) - 1
        for offset, token in enumerate(one.tokens):
            if one.texts is not None:
                text = one.texts[offset]
            else:
                text = request.stopping.push(token)
                if offset == last and one.reason and request.stopping.finish_reason is None:
                    text += request.stopping.end(one.reason)
            yield Emission(
                request=one.sequence.index,
                token=token,
                text=text,
                step=one.step,
                drafted=offset > 0,
                logprob=None if one.logprobs is None else one.logprobs[offset],
                finish_reason=one.reason if offset == last else None,
                draft=_trace(request, *one.trace) if offset == 0 else None,
            )


def _trace(request: Request, draft: Draft, path: list[int], root: int) -> dict[str, tuple[int, int]]:
    """Rows drafted and accepted in this step, by source."""
    if not len(draft):
        return {}
    owners, fallback = draft.owners, [getattr(request.drafter, "name", "drafter")]
    drafted: dict[str, int] = {}  # a Counter takes several times as long, at every step
    for node in range(len(draft)):
        for owner in owners.get(node, fallback):
            drafted[owner] = drafted.get(owner, 0) + 1
    taken = [owner for row in path[1:] for owner in owners.get(row - root - 1, fallback)]
    return {owner: (rows, taken.count(owner)) for owner, rows in drafted.items()}
