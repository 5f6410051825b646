"""A step's bucket: its layout, its buffers and, on a GPU, the CUDA graph that replays it.

Rows, slots and the number of likeliest tokens are rounded up to a few sizes. A bucket is captured when it is needed for the
second time; the graph holds the copy in, all launches and the copy out, so a step is one replay and one wait.
"""

import functools
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from shoestring.engine.cuda.attention import Workspace
from shoestring.engine.cuda.cache import MAX_SLOTS
from shoestring.engine.cuda.choose import MAX_TOP, Candidates
from shoestring.engine.cuda.decoder import Buffers, Decoder
from shoestring.engine.cuda.layout import Bucket, DeviceLayout, HostLayout

__all__ = ["GRAPH_ROWS", "ROW_SIZES", "BucketStep", "BucketSteps", "bucket_of"]

ROW_SIZES = (1, 8, 16, 24, 32, 48, 64, 128, 192, 256)
"""Rows of buckets. Two take as long as eight, and 96 as long as 128 (or longer: an H200 with SmolLM2's shapes)."""
_SLOTS = (1, 2, 4, 8, MAX_SLOTS)
_TOPS = (1, 8, MAX_TOP)
GRAPH_ROWS = ROW_SIZES[-1]
"""The most rows of a pass."""
_MOST_BUCKETS = 48


@functools.lru_cache(maxsize=4096)
def bucket_of(slots: int, rows: int, top_k: int) -> tuple[Bucket, int]:
    """The bucket that a step fits into, and its number of likeliest tokens.

    Steps of several rows find some in any case, so that drafters which ask for them need no graphs of their own.
    """
    many = next(size for size in _SLOTS if size >= slots)
    wide = next(size for size in ROW_SIZES if size >= max(rows, many))
    least = top_k if wide == 1 else max(top_k, _TOPS[1])
    return Bucket(many, wide), next(size for size in _TOPS if size >= least)


class BucketStep:
    """One bucket, ready to run: fill `host`, `run`, and read `chosen`."""

    def __init__(
        self,
        decoder: Decoder,
        table: torch.Tensor,
        buffers: Buffers,
        bucket: Bucket,
        top_k: int,
    ) -> None:
        self._decoder, self._table, self.buffers, self.top_k = decoder, table, buffers, top_k
        self.layout = DeviceLayout.allocate(bucket, decoder.device)
        self.host = HostLayout(self.layout)
        self._plan = decoder.plan(bucket.slots, bucket.rows)
        self._workspace = Workspace.allocate([self._plan], decoder.device)
        outputs = bucket.rows
        self._candidates = Candidates.allocate(outputs, decoder.config.vocab_size, top_k, decoder.device)
        on_gpu = decoder.device.type == "cuda"
        self._chosen = torch.zeros(outputs * (1 + top_k), dtype=torch.int32, pin_memory=on_gpu)
        self._numbers = self._chosen.numpy()
        self._graph: torch.cuda.CUDAGraph | None = None
        self.uses = 0
        """How often all of it has run."""
        self._sent = torch.cuda.Event() if on_gpu else None
        self._waited = True

    @property
    def logits(self) -> torch.Tensor:
        """The output rows' logits [O, V], float32, until the next step."""
        return self.buffers.logits[: self.layout.bucket.rows]

    def launch(self, hidden: dict[int, torch.Tensor] | None = None) -> None:
        """Copy in, launch everything, copy out; nothing is waited for."""
        self.host.send()
        self._decoder.run(
            self.layout,
            self._table,
            self._plan,
            self._workspace,
            self.buffers,
            self._candidates,
            hidden,
        )
        self._chosen.copy_(self.buffers.chosen[: len(self._chosen)], non_blocking=True)

    def capture(self, pool: Any) -> None:
        """Record the launches as a CUDA graph. It must have run before, which compiles its kernels."""
        stream = torch.cuda.Stream(self._decoder.device)
        stream.wait_stream(torch.cuda.current_stream(self._decoder.device))
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.launch()
        self._graph = graph

    @property
    def settled(self) -> bool:
        """Whether it has run before as it will run now: nothing is left to compile or to capture."""
        return self.captured or self.uses > 1

    @property
    def captured(self) -> bool:
        """Whether a graph replays the step."""
        return self._graph is not None

    def run(self, hidden: dict[int, torch.Tensor] | None = None) -> None:
        """Run the step that `host` holds."""
        self.uses += not hidden
        if self._graph is not None and not hidden:
            self._graph.replay()
        else:
            self.launch(hidden)
        if self._sent is not None:
            self._sent.record()
            self._waited = False

    def wait(self) -> None:
        """Until the step has run: only then may `host` be filled again."""
        if self._sent is not None and not self._waited:
            self._sent.synchronize()
            self._waited = True

    def chosen(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The first output rows' next tokens, int32 [count], and their likeliest tokens [count, top_k] (waits)."""
        self.wait()
        first = self.layout.bucket.rows
        likeliest = self._numbers[first : first + count * self.top_k].reshape(count, self.top_k)
        return self._numbers[:count].copy(), likeliest.copy()


class BucketSteps:
    """All buckets of a decoder, made when they are first needed; the least recently used are dropped.

    Args:
        graphs: whether to capture CUDA graphs.
        on_failure: called with the reason where a capture fails (out of memory); steps then run without a graph.
    """

    def __init__(
        self,
        decoder: Decoder,
        table: torch.Tensor,
        graphs: bool,
        on_failure: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self._decoder, self._table = decoder, table
        self.graphs = graphs and decoder.device.type == "cuda"
        self._on_failure = on_failure
        self._steps: OrderedDict[tuple[Bucket, int], BucketStep] = OrderedDict()
        self.buffers = decoder.buffers(GRAPH_ROWS, GRAPH_ROWS)
        """All buckets' numbers: one step runs at a time."""
        self._pool = torch.cuda.graph_pool_handle() if self.graphs else None
        self.capture_seconds = 0.0

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that steps share."""
        return self.buffers.nbytes

    def get(self, slots: int, rows: int, top_k: int) -> BucketStep:
        """The bucket for such a step."""
        key = bucket_of(slots, rows, top_k)
        found = self._steps.get(key)
        if found is None:
            while len(self._steps) >= _MOST_BUCKETS:
                self._steps.popitem(last=False)
            bucket, most = key
            found = self._steps[key] = BucketStep(self._decoder, self._table, self.buffers, bucket, most)
        self._steps.move_to_end(key)
        return found

    def prepare(self, step: BucketStep) -> None:
        """Capture the bucket's graph, with its layout filled, where that is wanted and not done yet.

        Not at its first use: a prompt's length may never come again.
        """
        if not self.graphs or step.captured or not step.uses:
            return
        began = time.perf_counter()
        try:
            step.capture(self._pool)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            self.graphs = False
            torch.cuda.synchronize()
            self._on_failure(str(error).splitlines()[0])
        self.capture_seconds += time.perf_counter() - began

    def warm_up(self, slots: int, progress: Callable[[int, int], None] | None = None) -> None:
        """Capture the buckets of so many slots and fewer, with all numbers of rows that drafting asks for.

        No step may be under way.
        """
        kinds = [
            (size, rows, top)
            for size in _SLOTS
            if size == 1 or size < 2 * slots
            for rows in ROW_SIZES
            if rows >= size
            for top in (_TOPS[:2] if rows == 1 else _TOPS[1:2])
        ]
        for done, (size, rows, top) in enumerate(kinds):
            if progress is not None:
                progress(done, len(kinds))
            if not self.graphs:
                continue
            step = self.get(size, rows, top)
            if step.captured:
                continue
            step.host.fill({}, {}, {})
            step.run()
            step.wait()
            self.prepare(step)
        if progress is not None:
            progress(len(kinds), len(kinds))

    def clear(self) -> None:
        """Drop all buckets and their graphs."""
        self._steps.clear()
