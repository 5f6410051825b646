"""Embeddings that rows bring themselves (look-ahead tokens, images), kept on the device between steps.

A drafter sends the same few vectors step after step; each is copied once, and a step's layout says which of them a row has.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from shoestring.engine.tokentree import NativeTree, TokenTree

__all__ = ["OwnRows"]

_Identity = int | tuple[int, int]


class OwnRows:
    """Vectors in a buffer [N, E] of the device, by the tensors that they were given as.

    A tensor that is changed in place is copied again. Tensors are kept alive while they are in the buffer.
    """

    def __init__(self, buffer: Float[Tensor, "N E"]) -> None:
        self._buffer = buffer
        self._places: dict[_Identity, int] = {}
        self._kept: list[Tensor] = []
        # Those of lists that came before, which are kept alive: most steps bring the same one.
        self._of_lists: dict[int, tuple[Sequence[Tensor], list[int]]] = {}

    def place(self, trees: Mapping[int, TokenTree]) -> dict[int, list[int]]:
        """Where the trees' embeddings lie, by slot, in the order of `tree.embeddings`; of a native tree its `vectors`.

        They are at most N in all.

        No step that reads the buffer may be under way.
        """
        wanted: dict[int, Sequence[Tensor]] = {}
        for slot, tree in trees.items():
            if isinstance(tree, NativeTree):
                wanted[slot] = tree.vectors
            elif tree.embeddings:
                wanted[slot] = list(tree.embeddings.values())
        if not wanted:
            return {}
        known = {slot: self._of_lists.get(id(some)) for slot, some in wanted.items()}
        if None not in known.values():
            return {slot: found[1] for slot, found in known.items() if found}
        keys = {slot: [*map(_identity, vectors)] for slot, vectors in wanted.items()}
        if not all(key in self._places for some in keys.values() for key in some):
            self._copy(
                {
                    key: vector
                    for slot, vectors in wanted.items()
                    for key, vector in zip(keys[slot], vectors, strict=True)
                }
            )
        places = {slot: [*map(self._places.__getitem__, some)] for slot, some in keys.items()}
        for slot, tree in trees.items():
            if isinstance(tree, NativeTree) and all(vector.is_inference() for vector in tree.vectors):
                self._of_lists[id(tree.vectors)] = tree.vectors, places[slot]
        return places

    def _copy(self, every: dict[_Identity, Tensor]) -> None:
        """Bring those of a step's vectors into the buffer that are not in it."""
        new = {key: vector for key, vector in every.items() if key not in self._places}
        if len(self._places) + len(new) > len(self._buffer):  # make room: what this step needs comes anew
            self._places, self._kept, self._of_lists, new = {}, [], {}, every
        first = len(self._places)
        self._buffer[first : first + len(new)] = torch.stack(
            [vector.detach().to(self._buffer.device) for vector in new.values()]
        )
        self._places |= {key: first + index for index, key in enumerate(new)}
        self._kept += new.values()


def _identity(vector: Tensor) -> _Identity:
    """A tensor, and how often it was changed in place (inference tensors do not count; they are taken as constant)."""
    return id(vector) if vector.is_inference() else (id(vector), vector._version)
