"""Suffix matches in prompt and output: what followed the last few tokens before may follow them again."""

from collections.abc import Sequence

from shoestring.decoding.drafters.protocol import Context, Draft, StepObservation

__all__ = ["NgramDrafter", "SuffixIndex"]


class SuffixIndex:
    """Where each n-gram of a growing sequence ended last, for all lengths up to `longest`."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self._ends: list[dict[tuple[int, ...], list[int]]] = [{} for _ in range(longest + 1)]
        self._indexed = 0

    def extend(self, tokens: Sequence[int]) -> None:
        """Index what is new; the last token is left out, as nothing follows it yet."""
        for end in range(max(self._indexed, 1), len(tokens)):
            for length in range(1, min(self.longest, end) + 1):
                gram = tuple(tokens[end - length : end])
                ends = self._ends[length].setdefault(gram, [])
                ends.append(end)
                if len(ends) > 8:
                    del ends[0]
        self._indexed = max(self._indexed, len(tokens))

    def positions(self, suffix: tuple[int, ...]) -> list[int]:
        """Where the text after `suffix` begins, most recent first."""
        return self._ends[len(suffix)].get(suffix, [])[::-1]


class NgramDrafter:
    """Prompt lookup with the longest match first, over prompt and output.

    Args:
        longest, shortest: lengths of the suffix that is looked for.
        tokens: the most drafted tokens of a branch; grows and shrinks with acceptance up to it.
        branches: the most different continuations.
    """

    name = "ngram"

    def __init__(self, longest: int = 4, shortest: int = 1, tokens: int = 10, branches: int = 1) -> None:
        self._longest, self._shortest = longest, shortest
        self._tokens, self._branches = tokens, branches
        self._depth = tokens
        self._index = SuffixIndex(longest)

    def begin(self, prompt: Sequence[int]) -> None:
        """Forget the last sequence."""
        self._index = SuffixIndex(self._longest)
        self._depth = self._tokens

    def propose(self, context: Context, budget: int) -> Draft:
        """Continuations of the longest matching suffixes."""
        tokens = context.tokens
        self._index.extend(tokens)
        draft, branches = Draft(), 0
        for length in range(min(self._longest, len(tokens)), self._shortest - 1, -1):
            for position in self._index.positions(tuple(tokens[-length:])):
                room = min(self._depth, budget - len(draft))
                if room <= 0 or branches == self._branches:
                    return draft
                before = len(draft)
                draft.add_branch(tokens[position : position + room])
                branches += len(draft) > before
        return draft

    def observe(self, step: StepObservation) -> None:
        """Draft deeper after a full hit, shallower after a miss."""
        if len(step.draft):
            if len(step.accepted) >= self._depth:
                self._depth = min(self._tokens, self._depth * 2)
            elif not step.accepted:
                self._depth = min(self._tokens, max(2, self._depth // 2))
            else:
                self._depth = min(self._tokens, max(self._depth, 2 * len(step.accepted)))
