"""When a sequence ends, and its text as it grows: EOS ids, stop strings, incremental detokenising."""

from collections.abc import Sequence
from typing import Any, Protocol

from shoestring.errors import RequestError

__all__ = ["IncrementalDetokenizer", "StopChecker", "Stopping"]


class Stopping(Protocol):
    """Says, token by token, where a sequence ends, and what text the tokens give."""

    finish_reason: str | None

    def push(self, token: int) -> str:
        """Add an emitted token; return the text to give out. Sets `finish_reason` where the sequence ends."""

    def end(self, reason: str) -> str:
        """End the sequence from outside; return the text still held back."""

    def foresee(self, tokens: Sequence[int]) -> tuple[int, str | None] | None:
        """How many of these tokens `push` would take, and why the sequence would end there (None: it would not).

        None where their text decides: they have to be pushed to know.
        """


class IncrementalDetokenizer:
    """Text of a growing token sequence; the pieces joined are the decoded whole.

    Characters whose bytes are split across tokens are held back until they are complete. Decoding looks back only a
    few tokens, so that a long text costs no more per token than a short one.
    """

    _LOOK_BACK = 6

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._tokens: list[int] = []
        self._start = 0  # decoding starts at this token
        self._known = ""  # text of tokens[start:] that was given out

    def push(self, token: int) -> str:
        """Add a token; return the text that is now certain."""
        self._tokens.append(token)
        text = self._decode(self._start)
        if text.endswith("\ufffd"):
            return ""
        new = text[len(self._known) :]
        self._known = text
        if len(self._tokens) - self._start > 2 * self._LOOK_BACK:
            self._advance()
        return new

    def flush(self) -> str:
        """The rest, incomplete characters as replacement characters."""
        text = self._decode(self._start)
        new = text[len(self._known) :]
        self._known = text
        return new

    def _advance(self) -> None:
        # Move the start to where decoding from there gives just the end of the known text.
        start = len(self._tokens) - self._LOOK_BACK
        text = self._decode(start)
        if text and self._known.endswith(text) and "\ufffd" not in text:
            self._start, self._known = start, text

    def _decode(self, start: int) -> str:
        text: str = self._tokenizer.decode(
            self._tokens[start:], skip_special_tokens=self._skip, clean_up_tokenization_spaces=False
        )
        return text


class StopChecker:
    """Turns emitted tokens into text and says where the sequence ends.

    Args:
        tokenizer: None for a model without one: then there is no text, and stop strings are refused.
        eos_ids: any of these ends the sequence; it is kept in the tokens and not in the text.
        max_new_tokens: the most tokens.
        stop: strings that end the sequence; the text ends before the first of them.
    """

    def __init__(
        self,
        tokenizer: Any,
        eos_ids: Sequence[int] = (),
        max_new_tokens: int = 256,
        stop: Sequence[str] = (),
    ) -> None:
        if max_new_tokens <= 0:
            raise RequestError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        if any(not text for text in stop):
            raise RequestError("a stop string is empty; leave it out")
        if stop and tokenizer is None:
            raise RequestError("stop strings need a tokenizer, and this model's folder has none")
        self._eos, self._most, self._stop = frozenset(eos_ids), max_new_tokens, tuple(stop)
        self._detokenizer = IncrementalDetokenizer(tokenizer) if tokenizer is not None else None
        self._held = ""  # text that may turn out to begin a stop string
        self.count = 0
        self.finish_reason: str | None = None

    def push(self, token: int) -> str:
        """Add an emitted token; return the text to give out. Sets `finish_reason` where the sequence ends."""
        self.count += 1
        if token in self._eos:
            self.finish_reason = "stop"
            return self._flush()
        text = self._held + (self._detokenizer.push(token) if self._detokenizer else "")
        end = self._find_stop(text)
        if end is not None:
            self.finish_reason, self._held = "stop", ""
            return text[:end]
        if self.count >= self._most:
            self.finish_reason, self._held = "length", text
            return self._flush()
        hold = self._longest_partial_stop(text)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def foresee(self, tokens: Sequence[int]) -> tuple[int, str | None] | None:
        """How many of these tokens `push` would take, and why the sequence would end there; None: their text decides."""
        if self._stop:
            return None
        for count, token in enumerate(tokens, 1):
            if token in self._eos:
                return count, "stop"
            if self.count + count >= self._most:
                return count, "length"
        return len(tokens), None

    def end(self, reason: str) -> str:
        """End the sequence from outside; return the text still held back."""
        self.finish_reason = reason
        return self._flush()

    def _flush(self) -> str:
        text = self._held + (self._detokenizer.flush() if self._detokenizer else "")
        self._held = ""
        end = self._find_stop(text)
        return text if end is None else text[:end]

    def _find_stop(self, text: str) -> int | None:
        return min((at for stop in self._stop if (at := text.find(stop)) >= 0), default=None)

    def _longest_partial_stop(self, text: str) -> int:
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
