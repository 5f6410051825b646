"""Rounding to the nearest, clipping and GPTQ side by side: perplexity on text and weights that were never quantised.

A small Llama is trained for it (`--train`, minutes on a GPU) on the corpus without its last 400,000 characters, which its
vocabulary has not seen either; perplexity is taken on the last 50,000 tokens, in windows of 512. The weights are replaced
by the values of their grids and run in float32 in transformers' module, so that nothing but the weights differs; int8 and
int4 are our packing's (a scale for each 32 inputs, int4 with a minimum, embedding and head in int8). GPTQ sees text from
before the held-out part. Windows are resampled for the 95% interval of each change. `--origin-model` adds a model that was
published in 4 bits: its weights lie on such a grid already, so that its numbers say little of others.

    python -m benchmarks.quantization_quality --train /tmp/quality-llama --device cuda --seconds 150
    python -m benchmarks.quantization_quality --model /tmp/quality-llama --origin-model smollm2-135m --device cuda \
        --output benchmarks/results/quantization-quality.nvidia-h100.json
"""

import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import parser
from benchmarks.quantization import corpus
from shoestring.evaluation.results import provenance, write_result
from shoestring.quantization import calibrated, rounded
from shoestring.quantization.calibration import calibration_windows, tokens_of

HELD_OUT, HELD_OUT_CHARACTERS, WINDOW = 50_000, 400_000, 512
TARGETS = {"int8": 0.5, "int4": 5.0}
"""Percent of perplexity that a weight type may cost."""
REFERENCE = "float32"

Quantise = Callable[[Any, Tensor], object]


def _to_bfloat16(model: Any, _: Tensor) -> None:
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay as they are
        parameter.data.copy_(parameter.data.to(torch.bfloat16))


SETTINGS: dict[str, Quantise] = {
    REFERENCE: lambda model, _: None,
    "bfloat16": _to_bfloat16,
    "int8 nearest": lambda model, _: rounded(model, "int8"),
    "int8 GPTQ": lambda model, tokens: calibrated(model, tokens, "int8"),
    "int4 nearest": lambda model, _: rounded(model, "int4", clip=False),
    "int4 clipping": lambda model, _: rounded(model, "int4"),
    "int4 GPTQ": lambda model, tokens: calibrated(model, tokens, "int4", clip=False),
    "int4 GPTQ, clipping": lambda model, tokens: calibrated(model, tokens, "int4"),
    "int4 GPTQ, clipping, activation order": lambda model, tokens: calibrated(
        model, tokens, "int4", activation_order=True
    ),
}


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument(
        "--train", type=Path, metavar="FOLDER", help="train the model into this folder, and end"
    )
    arguments.add_argument(
        "--seconds", type=float, default=150, help="of training; steps are set by a probe before it"
    )
    arguments.add_argument("--epochs", type=float, default=6, help="the most passes over the text")
    arguments.add_argument("--batch", type=int, default=64, help="sequences of 512 a training step")
    arguments.add_argument("--layers", type=int, default=8)
    arguments.add_argument("--width", type=int, default=512)
    arguments.add_argument("--vocabulary", type=int, default=16384)
    arguments.add_argument(
        "--characters", type=int, help="train on this much of the text only, to try things out"
    )
    arguments.add_argument("--origin-model", help="a model of 4-bit origin, measured beside")
    arguments.add_argument("--calibration", type=int, default=128, help="windows of text that GPTQ sees")
    arguments.add_argument("--windows", type=int, help="measure on so many windows only, to try things out")
    options = arguments.parse_args()
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.train:
        train(options.train, options)
        return
    models = {"trained": measured(options.model, options)}
    notes = Path(options.model) / "training.json"
    if notes.is_file():
        models["trained"]["training"] = json.loads(notes.read_text())
    if options.origin_model:
        models["4-bit by origin"] = measured(options.origin_model, options)
    result = {
        "benchmark": "quantization-quality",
        "window": WINDOW,
        "calibration_windows": options.calibration,
        "targets_percent": TARGETS,
        "models": models,
    }
    print(json.dumps(result))
    if options.output:
        write_result(options.output, result, options.device)


def measured(name: str, options: Any) -> dict[str, Any]:
    """Perplexities of a model by its weights."""
    from shoestring.hub import load_pretrained

    loaded = load_pretrained(name, dtype="float32", device=options.device)
    tokenizer: Any = loaded.tokenizer
    text = corpus()
    held_out = tokens_of(tokenizer, text[-HELD_OUT_CHARACTERS:])[-HELD_OUT:]
    if len(held_out) < HELD_OUT:
        raise SystemExit(f"{name}: the held-out text has only {len(held_out)} tokens")
    windows = list(held_out.split(WINDOW))[: options.windows]
    calibration = calibration_windows(tokenizer, text[:-HELD_OUT_CHARACTERS], options.calibration)
    rows: dict[str, Any] = {}
    plain = np.empty(0)
    counts = np.array([len(window) - 1 for window in windows])
    for setting, quantise in SETTINGS.items():
        model = copy.deepcopy(loaded.model)
        began = time.perf_counter()
        quantise(model, calibration)
        seconds = time.perf_counter() - began
        losses = window_losses(model, windows)
        plain = losses if setting == REFERENCE else plain
        low, high = interval(losses - plain, counts)
        change = 100 * math.expm1((losses - plain).sum() / counts.sum())
        rows[setting] = {
            "perplexity": round(math.exp(losses.sum() / counts.sum()), 4),
            "change_percent": round(change, 3),
            "interval_95_percent": [round(low, 3), round(high, 3)],
            "seconds_to_quantise": round(seconds, 2),
        }
        if (kind := setting.split()[0]) in TARGETS:
            rows[setting]["within_target"] = change <= TARGETS[kind]
        print(f"{name}, {setting}: {rows[setting]}", flush=True)
    parameters = sum(parameter.numel() for parameter in loaded.model.parameters())
    return {
        "model": name,
        "parameters": parameters,
        "tokens": int(sum(map(len, windows))),
        "predicted_tokens": int(counts.sum()),
        "settings": rows,
    }


@torch.no_grad()
def window_losses(model: Any, windows: list[Tensor], batch: int = 8) -> np.ndarray:
    """The summed negative log-likelihood of each window's tokens after its first, in float64."""
    losses = []
    for start in range(0, len(windows), batch):
        part = windows[start : start + batch]
        together = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(model.device)
        logits = model(input_ids=together, use_cache=False).logits[:, :-1].float()
        found = torch.nn.functional.cross_entropy(logits.transpose(1, 2), together[:, 1:], reduction="none")
        losses += [
            float(row[: len(window) - 1].double().sum()) for row, window in zip(found, part, strict=True)
        ]
    return np.array(losses)


def interval(differences: np.ndarray, counts: np.ndarray, draws: int = 5000) -> tuple[float, float]:
    """95% of the changes of perplexity, in percent, over resampled windows; both settings saw the same ones."""
    picked = np.random.default_rng(0).integers(0, len(counts), (draws, len(counts)))
    changes = 100 * np.expm1(differences[picked].sum(1) / counts[picked].sum(1))
    low, high = np.percentile(changes, [2.5, 97.5])
    return float(low), float(high)


def train(folder: Path, options: Any) -> None:
    """A Llama on all but the corpus's end; the folder is a Hugging Face one, in float32."""
    from transformers import AutoTokenizer

    text = corpus()[:-HELD_OUT_CHARACTERS][: options.characters]
    began = time.perf_counter()
    if (folder / "tokenizer.json").is_file():  # of an earlier run that was stopped
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer = trained_tokenizer(text, options.vocabulary)
        tokenizer.save_pretrained(folder)
    ids = tokens_of(tokenizer, text)
    sequences = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW).to(options.device)
    print(f"{len(ids):,} tokens, tokenizer in {time.perf_counter() - began:.0f} s", flush=True)
    probe = Training(options, steps=1000)
    for _ in range(3):
        probe.step(sequences[: options.batch])
    began = time.perf_counter()
    for _ in range(10):
        probe.step(sequences[: options.batch])
    rate = 10 / (time.perf_counter() - began)
    del probe
    steps = max(1, min(int(options.seconds * rate), int(options.epochs * len(sequences) / options.batch)))
    print(f"{rate:.2f} steps/s: {steps} steps", flush=True)
    training = Training(options, steps)
    order, loss, began = torch.empty(0, dtype=torch.long), 0.0, time.perf_counter()
    for step in range(steps):
        if len(order) < options.batch:
            order = torch.cat([order, torch.randperm(len(sequences))])
        taken, order = order[: options.batch], order[options.batch :]
        loss = training.step(
            sequences[taken.to(sequences.device)], wanted=step % 200 == 0 or step == steps - 1
        )
        if step % 200 == 0 or step == steps - 1:
            print(f"step {step + 1}: loss {loss:.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    seconds = time.perf_counter() - began
    training.model.save_pretrained(folder)
    notes = {
        "steps": steps,
        "batch": options.batch,
        "tokens": len(ids),
        "epochs": round(steps * options.batch / len(sequences), 2),
        "held_out_characters": HELD_OUT_CHARACTERS,
        "seconds": round(seconds, 1),
        "final_loss": round(loss, 4),
    }
    (folder / "training.json").write_text(json.dumps(provenance(options.device) | notes, indent=1))


def trained_tokenizer(text: str, vocabulary: int) -> Any:
    """A byte-level BPE of this size, from every fourth line of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(text.splitlines(keepends=True)[::4], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


class Training:
    """A model of random weights, AdamW and a cosine of so many steps behind a short warm-up; bf16 autocast."""

    def __init__(self, options: Any, steps: int) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        width = options.width
        config = LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=width,
            intermediate_size=width * 11 // 4 // 32 * 32,
            num_hidden_layers=options.layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )
        self.device = torch.device(options.device)
        self.model = LlamaForCausalLM(config).to(self.device)
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, lr=1.5e-3, betas=(0.9, 0.95), fused=self.device.type == "cuda"
        )
        warm_up = max(1, min(200, steps // 10))

        def factor(step: int) -> float:
            if step < warm_up:
                return (step + 1) / warm_up
            return 0.05 + 0.475 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def step(self, batch: Tensor, wanted: bool = True) -> float:
        """One step on sequences [batch, 512]; the loss, where wanted (it makes a GPU wait)."""
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return loss.item() if wanted else 0.0


if __name__ == "__main__":
    main()
