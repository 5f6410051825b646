"""Loading time and memory of one engine in a process of its own; `benchmarks.llama_cpp` runs it.

python -m benchmarks.llama_cpp_fresh shoestring model.gguf 2
"""

import json
import sys
import time
from pathlib import Path


def memory() -> dict[str, int]:
    """Resident bytes of this process, and those of them that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("VmRSS", "RssAnon"))}
    return {"resident": 1024 * int(fields["VmRSS"]), "anonymous": 1024 * int(fields["RssAnon"])}


def main() -> None:
    name, path, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    if name == "shoestring":
        # What any program that uses the package has imported.
        import accelerate  # noqa: F401
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

        import shoestring.model

        before, began = memory(), time.perf_counter()
        model = shoestring.model.load(path, device="cpu")
        seconds = time.perf_counter() - began
        model.generate("The sky is", decoding="autoregressive", max_new_tokens=32)
    else:
        import llama_cpp

        before, began = memory(), time.perf_counter()
        llm = llama_cpp.Llama(path, n_ctx=2048, n_threads=threads, verbose=False)
        seconds = time.perf_counter() - began
        llm("The sky is", max_tokens=32, temperature=0.0)
    after = memory()
    grown = {f"{kind}_growth": after[kind] - before[kind] for kind in after}
    print(json.dumps({"load_seconds": round(seconds, 3), **grown}))


if __name__ == "__main__":
    main()
