"""Texts that a model writes by itself, for a datastore of drafts: requests of its own making, and its answers to them.

Asked to go on where a user's turn begins, a chat model makes up a request (Magpie, arXiv 2406.08464); what it answers
shows what it likes to say, and nothing of anybody's texts. One without a chat format goes on from its first token.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from importlib import resources
from pathlib import Path

import numpy as np

from shoestring.decoding.decode import Request, decode
from shoestring.decoding.kept_arrays import keep_array, kept_array
from shoestring.decoding.stopping import StopChecker
from shoestring.engine.runner import Runner
from shoestring.engine.sampling import SamplingOptions

__all__ = ["bundled_texts", "keep_texts", "remembered_texts", "write_texts"]

_BATCH = 8
_REQUEST_TOKENS, _ANSWER_TOKENS = 48, 192
_BEFORE_ANSWER = 6  # tokens of the chat format that are kept in front of an answer
SECONDS = 6.0
_MOST_TOKENS, _LEAST_TOKENS = 400_000, 8_000


def write_texts(
    runner: Runner,
    opening: Sequence[int],
    ending: Sequence[int] | None,
    eos_ids: Sequence[int] = (),
    seconds: float | None = None,
    tokens: int = _MOST_TOKENS,
    progress: Callable[[int, int], None] | None = None,
    batch: int = _BATCH,
    first: int = 0,
) -> np.ndarray:
    """At most so many tokens of the model's own texts, as the time allows, one behind another: int32 [N].

    Args:
        runner: the model; a slot or more must be free.
        opening: the chat format in front of a user's first words, or a first token.
        ending: the chat format between a request and its answer; None: there is none, and texts are free.
        eos_ids: tokens that end a request or an answer.
        seconds: `SECONDS` by default; none are written by a model so slow that it would not get far.
        tokens: at most.
        progress: called with per cent of the time or of the tokens, and 100.
        batch: texts at a time, as far as slots are free.
        first: number of the first request; others are other requests.
    """
    seconds = SECONDS if seconds is None else seconds
    room = runner.max_positions
    if room is not None and room <= len(opening) + len(ending or ()) + _REQUEST_TOKENS:
        return np.empty(0, np.int32)
    made_up: deque[list[int]] = deque()
    answers: list[bool] = []  # by request of the decoding loop
    written: dict[int, list[int]] = {}
    texts: list[int] = []

    def requests() -> Iterator[Request]:
        while True:
            answers.append(ending is None or bool(made_up))
            prompt, sampling, most = [*opening], SamplingOptions(), _ANSWER_TOKENS
            if made_up:
                prompt += [*made_up.popleft(), *(ending or ())]
            else:
                sampling = SamplingOptions(temperature=1.0, sample=first + len(answers))
                most = _REQUEST_TOKENS if ending is not None else most
            yield Request(prompt=prompt, sampling=sampling, stopping=StopChecker(None, eos_ids, most))

    began = now = time.perf_counter()
    counted, judged = 0, False
    slots = max(1, batch - len(runner.slots))  # runners have no more than some
    with closing(decode(runner, requests(), slots)) as emissions:
        for emission in emissions:
            text = written.setdefault(emission.request, [])
            text.append(emission.token)
            counted += answers[emission.request]
            if emission.finish_reason:
                del written[emission.request]
                if answers[emission.request]:
                    texts += [*(ending or ())[-_BEFORE_ANSWER:], *text]
                elif text[0] not in eos_ids:
                    made_up.append(text[:-1] if text[-1] in eos_ids else text)
            before, now = now, time.perf_counter()
            if not runner.settled:
                began += now - before  # compiling is not writing
            spent = now - began
            if not judged and spent > seconds / 6:
                judged = True
                if counted * seconds < spent * min(_LEAST_TOKENS, tokens):
                    return np.empty(0, np.int32)
            if spent > seconds or counted >= tokens:
                break
            if progress is not None and emission.finish_reason:
                progress(int(100 * max(spent / seconds, counted / tokens)), 100)
    for request, text in written.items():
        if answers[request]:
            texts += [*(ending or ())[-_BEFORE_ANSWER:], *text]
    if progress is not None:
        progress(100, 100)
    return np.array(texts[:tokens], np.int32)


def bundled_texts(name: str) -> np.ndarray | None:
    """The texts that come with the package for a model of this name, if there are any: int32 [N]."""
    source = resources.files("shoestring.decoding") / "texts" / f"{name}.npz"
    if not name.replace("-", "").replace(".", "").isalnum() or not source.is_file():
        return None
    with source.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return archive["tokens"].astype(np.int32)


def keep_texts(path: Path, texts: np.ndarray) -> None:
    """Write texts as they come with the package: compressed, to less than half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    smallest = np.uint16 if texts.max(initial=0) < 1 << 16 else np.int32
    np.savez_compressed(path, tokens=texts.astype(smallest))


def remembered_texts(
    path: Path,
    vocabulary: int,
    write: Callable[[], np.ndarray],
    anew: bool = False,
) -> np.ndarray:
    """The texts in the file `path`, or what `write` gives, written there (`anew`: in any case)."""
    texts = None if anew else kept_array(path)
    if texts is not None and _are_texts(texts, vocabulary):
        return texts
    texts = write()
    keep_array(path, texts)
    return texts


def _are_texts(array: np.ndarray, vocabulary: int) -> bool:
    """Whether they are tokens of a model with such a vocabulary, one behind another."""
    one_behind_another = array.dtype == np.int32 and array.ndim == 1
    return one_behind_another and 0 <= array.min(initial=0) <= array.max(initial=0) < vocabulary
