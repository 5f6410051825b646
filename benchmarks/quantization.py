"""What int8 and int4 cost in perplexity, on weights that were never quantised: a small Llama trained for it.

The last 50,000 tokens of the corpus are never trained on; perplexity is taken on them, in pieces of 512 tokens, with the
native step in float32, bfloat16, int8 and int4. Pieces are resampled for the interval of each ratio to bfloat16. `--train`
makes the model first (a minute or two on a GPU): a byte-pair vocabulary of 8,192 and 17M weights.

    python -m benchmarks.quantization --train /tmp/small-llama --device cuda
    python -m benchmarks.quantization --model /tmp/small-llama --output benchmarks/results/quantization.cpu.json
"""

import json
import lzma
import math
import os
import random
import time
from pathlib import Path
from typing import Any

from benchmarks.common import parser
from shoestring.evaluation.results import write_result

HELD_OUT, LENGTH, VOCABULARY = 50_000, 512, 8192
SETTINGS: dict[str, dict[str, str]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
}


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--train", type=Path, metavar="FOLDER", help="train the model into this folder")
    arguments.add_argument("--epochs", type=int, default=5)
    arguments.add_argument("--batch", type=int, default=64)
    options = arguments.parse_args()
    if options.train:
        train(options.train, options)
        return

    import shoestring

    pieces: list[list[int]] = []
    losses: dict[str, list[float]] = {}
    described = {}
    for name, settings in SETTINGS.items():
        model = shoestring.load(options.model, device="cpu", **settings)  # type: ignore[arg-type]
        described[name] = model.description
        if not pieces:
            held_out = model.encode(corpus()[-6 * HELD_OUT :])[-HELD_OUT:]
            pieces = [held_out[at : at + LENGTH] for at in range(0, HELD_OUT - LENGTH + 1, LENGTH)]
        losses[name] = [-sum(model.score(piece).logprobs) for piece in pieces]
        print(f"{name}: perplexity {perplexity(losses[name], pieces):.3f} ({model.description})", flush=True)
        model.forget()
    rows = {
        name: {
            "perplexity": round(perplexity(total, pieces), 4),
            "over_bfloat16_percent": round(
                100 * (perplexity(total, pieces) / perplexity(losses["bfloat16"], pieces) - 1), 3
            ),
            "interval_95_percent": interval(total, losses["bfloat16"], pieces),
            "runs": described[name],
        }
        for name, total in losses.items()
    }  # fmt: skip
    result = {
        "benchmark": "quantization",
        "model": str(options.model),
        "tokens": HELD_OUT,
        "pieces": LENGTH,
        "settings": rows,
    }
    notes = Path(options.model) / "training.json"
    if notes.is_file():
        result["training"] = json.loads(notes.read_text())
    print(json.dumps(result))
    if options.output:
        write_result(options.output, result, "cpu")


def corpus() -> str:
    folder = os.environ.get("SHOESTRING_DATA")
    if not folder:
        raise SystemExit("SHOESTRING_DATA names no folder of data sets")
    return lzma.open(Path(folder) / "corpus" / "english.txt.xz", "rt", encoding="utf-8").read()


def perplexity(losses: list[float], pieces: list[list[int]]) -> float:
    return math.exp(sum(losses) / sum(len(piece) - 1 for piece in pieces))


def interval(
    losses: list[float], reference: list[float], pieces: list[list[int]], draws: int = 2000
) -> list[float]:
    """95% of the resampled changes of perplexity, in percent; both settings saw the same pieces."""
    chance, changes = random.Random(0), []
    count = sum(len(piece) - 1 for piece in pieces) / len(pieces)
    differences = [a - b for a, b in zip(losses, reference, strict=True)]
    for _ in range(draws):
        mean = sum(chance.choices(differences, k=len(differences))) / len(differences)
        changes.append(100 * (math.exp(mean / count) - 1))
    changes.sort()
    return [round(changes[draws // 40], 3), round(changes[-draws // 40 - 1], 3)]


def train(folder: Path, options: Any) -> None:
    """A Llama of 8 layers, 384 wide, on all but the corpus's end."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    device = "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device
    began, text = time.perf_counter(), corpus()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    lines = text[: len(text) // 3].splitlines()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(lines, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    chunks = [text[at : at + 1_000_000] for at in range(0, len(text), 1_000_000)]
    ids = torch.tensor([token for encoding in backend.encode_batch(chunks) for token in encoding.ids])[
        :-HELD_OUT
    ]
    sequences = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH).to(device)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=2e-3, betas=(0.9, 0.95), fused=device != "cpu",
    )  # fmt: skip
    steps = options.epochs * (len(sequences) // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    order: list[int] = []
    step, loss = 0, torch.zeros(())
    while step < steps:
        order = order or torch.randperm(len(sequences)).tolist()
        batch, order = sequences[order[: options.batch]], order[options.batch :]
        if len(batch) < options.batch:
            continue
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            logits = model(batch, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten()
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        step += 1
        if step % 200 == 0 or step == steps:
            print(
                f"step {step} of {steps}: loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s",
                flush=True,
            )
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="15MB")
    tokenizer.save_pretrained(folder)
    from shoestring.evaluation.results import provenance

    notes = {"steps": steps, "batch": options.batch, "tokens": len(ids), "final_loss": round(loss.item(), 4)}
    (folder / "training.json").write_text(json.dumps(provenance(device) | notes, indent=1))


if __name__ == "__main__":
    main()
