"""Shoestring's native step beside llama.cpp (llama-cpp-python), on the same files, interleaved in one run.

For each weight type a GGUF of the model is written (the default model's own Q4_1 is used as it is; the others are its
expanded weights, rounded by the gguf package). Each round times both engines on: a step of each number of rows behind 512
tokens of context, the prefill of these, and greedy decoding of real prompts, plain and with drafts (llama-cpp-python's own
prompt lookup, our `auto`). Ratios are medians over rounds. Loading and memory are measured in fresh processes.

    python -m benchmarks.llama_cpp --output benchmarks/results/llama_cpp.cpu-2threads-avx512_bf16.json
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import chat, held_out_prompts, parser
from shoestring.evaluation.results import write_result

ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXT = 512
OURS, THEIRS = "shoestring", "llama.cpp"


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--types", nargs="*", default=["BF16", "Q8_0", "Q4_0", "Q4_1"])
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--prompts", type=int, default=2, help="of each of three sets")
    arguments.add_argument("--max-new-tokens", type=int, default=96)
    arguments.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = arguments.parse_args()

    from shoestring.hub.resolving import find_gguf

    source = find_gguf(options.model)
    if source is None:
        raise SystemExit(f"{options.model} is not a GGUF file or a bundled name")
    tables = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.types:
            path = rewritten(source, kind, Path(folder))
            tables[kind] = measure(path, options)
            report(kind, tables[kind])
    result = {
        "benchmark": "llama_cpp",
        "model": options.model,
        "threads": options.threads,
        "rounds": options.rounds,
        "context": CONTEXT,
        "max_new_tokens": options.max_new_tokens,
        "llama_cpp_python": _llama_version(),
        "types": tables,
    }
    print(json.dumps(result))
    if options.output:
        write_result(options.output, result, "cpu")


def rewritten(source: Path, kind: str, folder: Path) -> Path:
    """The model as a GGUF whose matrices are of one type; the file itself where they are already."""
    import gguf
    import numpy as np

    reader = gguf.GGUFReader(source)
    wanted = gguf.GGMLQuantizationType[kind]
    matrices = [tensor for tensor in reader.tensors if len(tensor.shape) == 2]
    if sum(tensor.tensor_type == wanted for tensor in matrices) > len(matrices) // 2:
        return source
    path = folder / f"{kind}.gguf"
    writer = gguf.GGUFWriter(path, str(reader.get_field("general.architecture").contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        item = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, field.contents(), field.types[0], item)
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if len(tensor.shape) < 2:
            writer.add_tensor(tensor.name, np.ascontiguousarray(data, np.float32))
        else:
            writer.add_tensor(tensor.name, gguf.quants.quantize(data, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Ours:
    """This package's native step on the file as it lies."""

    def __init__(self, path: Path, threads: int) -> None:
        import shoestring

        self.model = shoestring.load(str(path), device="cpu")
        assert self.model.runner.threads == threads  # type: ignore[attr-defined]

    def prefill(self, tokens: Sequence[int]) -> None:
        from shoestring.engine.runner import Outputs
        from shoestring.engine.sampling import SamplingOptions
        from shoestring.engine.tokentree import TokenTree

        runner, last = self.model.runner, len(tokens) - 1
        runner.clear()
        if 0 in runner.slots:
            runner.release(0)
            runner.clear()
        runner.open(0, SamplingOptions())
        runner.step({0: TokenTree.chain(tokens)}, Outputs({0: [last]}))[0].argmax(last)
        runner.commit({0: range(len(tokens))})

    def step(self, tokens: Sequence[int]) -> None:
        from shoestring.engine.tokentree import TokenTree

        self.model.runner.step({0: TokenTree.chain(tokens)})[0].argmax(0)

    def decode(self, prompt: Sequence[int], count: int, drafts: bool) -> int:
        if 0 in self.model.runner.slots:
            self.model.runner.release(0)
        self.model.forget()
        decoding = "auto" if drafts else "autoregressive"
        return len(self.model.generate(prompt, decoding=decoding, max_new_tokens=count).token_ids)


class Theirs:
    """llama-cpp-python: its low-level calls where a step is timed, its own `generate` for drafts."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp
        from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

        def load(**options: Any) -> Any:
            return llama_cpp.Llama(
                str(path), n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False, **options
            )

        self.api, self.plain = llama_cpp, load()
        self.rows = load(logits_all=True)
        self.drafting = load(draft_model=LlamaPromptLookupDecoding(num_pred_tokens=10), logits_all=True)

    def prefill(self, tokens: Sequence[int]) -> None:
        self.rows.reset()
        self._decode(self.rows, tokens, 0, every_row=False)
        self.rows.n_tokens = len(tokens)

    def step(self, tokens: Sequence[int]) -> None:
        self._decode(self.rows, tokens, self.rows.n_tokens, every_row=True)

    def decode(self, prompt: Sequence[int], count: int, drafts: bool) -> int:
        if drafts:
            self.drafting.reset()
            tokens = self.drafting.generate(list(prompt), temp=0.0, top_k=1, repeat_penalty=1.0)
            for made, token in enumerate(tokens, start=1):
                if made == count or token == self.drafting.token_eos():
                    return made
        # One call of llama_decode and an arg-max in numpy a token: faster than llama-cpp-python's own sampler chain.
        import numpy as np

        llm, vocabulary = self.plain, self.plain.n_vocab()
        self._decode(llm, prompt, 0, every_row=False)
        position, made = len(prompt), 0
        while True:
            pointer = self.api.llama_get_logits_ith(llm.ctx, -1)
            token = int(np.argmax(np.ctypeslib.as_array(pointer, (vocabulary,))))
            made += 1
            if made == count or token == llm.token_eos():
                return made
            self._decode(llm, [token], position, every_row=False)
            position += 1

    def _decode(self, llm: Any, tokens: Sequence[int], start: int, every_row: bool) -> None:
        api = self.api
        memory = api.llama_get_memory(llm.ctx)
        api.llama_memory_seq_rm(memory, 0, start, -1)
        batch = api.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for i, token in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, start + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = every_row or i == len(tokens) - 1
            if api.llama_decode(llm.ctx, batch):
                raise RuntimeError("llama_decode failed")
            api.llama_synchronize(llm.ctx)
        finally:
            api.llama_batch_free(batch)


def measure(path: Path, options: Any) -> dict[str, Any]:
    engines: dict[str, Any] = {
        OURS: Ours(path, options.threads),
        THEIRS: Theirs(path, options.threads),
    }
    model = engines[OURS].model
    model.step_cost()
    text = "\n\n".join(held_out_prompts("mt_bench", 30))
    tokens = model.encode(text)
    context, draft = tokens[:CONTEXT], tokens[CONTEXT : CONTEXT + max(ROWS)]
    prompts = [
        model.encode(chat(prompt))
        for name in ("mt_bench", "gsm8k", "humaneval")
        for prompt in held_out_prompts(name, options.prompts)
    ]
    for engine in engines.values():  # code, threads and pages are warm, and what drafts need is there
        engine.prefill(context)
        engine.step(draft)
        for drafts in (False, True):
            engine.decode(prompts[0], 8, drafts)
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in engines}
    rates: dict[str, dict[str, list[float]]] = {name: {} for name in engines}
    for _ in range(options.rounds):
        for name, engine in engines.items():
            times = seconds[name]
            times.setdefault("prefill", []).append(timed(lambda e=engine: e.prefill(context)))
            for rows in ROWS:
                best = min(timed(lambda e=engine, r=rows: e.step(draft[:r])) for _ in range(3))
                times.setdefault(str(rows), []).append(best)
        for drafts in (False, True):
            for name, engine in engines.items():
                began, made = time.perf_counter(), 0
                for prompt in prompts:
                    made += engine.decode(prompt, options.max_new_tokens, drafts)
                rate = made / (time.perf_counter() - began)
                rates[name].setdefault("drafts" if drafts else "plain", []).append(rate)
    engines.clear()
    gc.collect()
    return {
        "file_bytes": path.stat().st_size,
        "median_ms": {
            name: {size: round(1e3 * statistics.median(t), 2) for size, t in sizes.items()}
            for name, sizes in seconds.items()
        },
        "tokens_per_second": {
            name: {mode: round(statistics.median(r), 1) for mode, r in modes.items()} for name, modes in rates.items()
        },
        "ratios": ratios(seconds, rates),
        "fresh_process": {
            name: json.loads(subprocess.run(
                [sys.executable, "-m", "benchmarks.llama_cpp_fresh", name, str(path), str(options.threads)],
                check=True, capture_output=True, text=True,
            ).stdout)
            for name in (OURS, THEIRS)
        },
    }  # fmt: skip


def ratios(
    seconds: dict[str, dict[str, list[float]]], rates: dict[str, dict[str, list[float]]]
) -> dict[str, dict[str, Any]]:
    """How many times faster we are, over rounds."""
    pairs: dict[str, list[float]] = {}
    for size, ours in seconds[OURS].items():
        name = size if size == "prefill" else f"t({size})"
        pairs[name] = [b / a for a, b in zip(ours, seconds[THEIRS][size], strict=True)]
    for mode in rates[OURS]:
        pairs[mode] = [a / b for a, b in zip(rates[OURS][mode], rates[THEIRS][mode], strict=True)]
    pairs["auto over our plain"] = [
        a / b for a, b in zip(rates[OURS]["drafts"], rates[OURS]["plain"], strict=True)
    ]
    pairs["auto over their plain"] = [
        a / b for a, b in zip(rates[OURS]["drafts"], rates[THEIRS]["plain"], strict=True)
    ]
    return {
        name: {
            "median": round(statistics.median(values), 3),
            "range": [round(min(values), 3), round(max(values), 3)],
        }
        for name, values in pairs.items()
    }


def timed(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def report(kind: str, table: dict[str, Any]) -> None:
    ours, theirs = (table["median_ms"][name] for name in (OURS, THEIRS))
    print(f"{kind}: " + ", ".join(f"{size}: {ours[size]} / {theirs[size]} ms" for size in ours))
    print(f"  tokens/s {table['tokens_per_second']}")
    print(f"  ratios { ({name: row['median'] for name, row in table['ratios'].items()}) }")
    print(f"  {table['fresh_process']}", flush=True)


def _llama_version() -> str:
    import llama_cpp

    return str(llama_cpp.__version__)


if __name__ == "__main__":
    main()
