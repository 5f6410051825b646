"""The tables of how fast a fast feedforward layer is beside dense ones, on a CPU and on a GPU."""

from benchmarks.result_files import Result, load_results, table

__all__ = ["fast_feedforward_cpu", "fast_feedforward_gpu", "fast_feedforward_model", "gpu_parts"]

_WAYS = ("kernel", "module")


def fast_feedforward_cpu() -> str:
    """A layer's microseconds a token on a CPU by batch, over the faster dense layer."""
    parts = []
    for name, result in load_results("fast_feedforward_cpu"):
        rows = [
            [
                f"{row['dtype']}, {row['batch']} tokens" + ("" if row["huge_pages"] else ", small pages"),
                f"{row['kernel']['us']:.1f}",
                f"{row['module']['us']:.1f}",
                *(f"{row[f'{way} over dense {neurons}']:.1f}x" for neurons in (4095, 3072) for way in _WAYS),
            ]
            for row in result["inference"]
        ]
        step = result["training_step"]
        parts.append(
            f"Depth {result['depth']}, width {result['width']}, {result['machine']}, commit {result['commit']} "
            f"([{name}](RESULTS/{name})); us a token and layer, and how many times faster than a dense layer of as many "
            f"neurons, or of 3,072, at the better number of threads; medians. A training step of {step['batch']} tokens by "
            f"`sparse` is {step['sparse over masked']:.1f} times as fast as by `masked`.\n\n"
            + table(
                ["", "kernel", "module", *(f"{way} over {of}" for of in ("4,095", "3,072") for way in _WAYS)],
                rows,
            )
        )
    return "\n".join(parts) or "Not measured yet.\n"


def fast_feedforward_gpu() -> str:
    """A layer on a GPU by depth, width and batch, over the faster dense layer; and a training step."""
    parts = [
        part for name, result in load_results("fast_feedforward_gpu") for part in gpu_parts(name, result)
    ]
    return "\n".join(parts) or "Not measured yet.\n"


def gpu_parts(name: str, result: Result) -> list[str]:
    """The map and the training step of one result file."""
    batches = sorted({row["batch"] for row in result["table"]})
    shapes = dict.fromkeys((row["depth"], row["width"]) for row in result["table"])
    cells = {
        (row["depth"], row["width"], row["batch"]): f"{row['us'][row['chosen']]:.1f} us, "
        f"{row['dense_over_chosen']:.2f}x"
        for row in result["table"]
    }
    rows = [
        [f"depth {depth}, width {width}", *(cells.get((depth, width, batch), "") for batch in batches)]
        for depth, width in shapes
    ]
    steps = [
        [
            f"depth {row['depth']}, width {row['width']}, {row['batch']} tokens",
            *(f"{row['ms'][way]:.2f} ms" for way in ("ours", "masked", "dense")),
            f"{row['ms']['masked'] / row['ms']['ours']:.2f}x",
            f"{row['ms']['dense'] / row['ms']['ours']:.2f}x",
        ]
        for row in result["training"]
    ]
    later = result.get("ways_chosen_as_of")
    chosen = f", each cell by the way that is chosen as of commit {later}" if later else ""
    return [
        f"Inference of one tree, {result['dtype']}, {result['machine']}, commit {result['commit']}{chosen} "
        f"([{name}](RESULTS/{name})): microseconds a layer by `triton`, and how many times faster than the faster dense "
        "layer of as many neurons (cuBLAS), by tokens of a batch; medians, weights in no cache:\n\n"
        + table(["", *(f"{batch:,}" for batch in batches)], rows),
        "Forward and backward with all gradients, launched from Python:\n\n"
        + table(["", "`triton`", "`masked`", "dense", "over `masked`", "over dense"], steps),
    ]


def fast_feedforward_model() -> str:
    """A whole classifier's milliseconds a text, and what trees gain over dense feedforwards in it."""
    parts = []
    for name, result in load_results("fast_feedforward_model"):
        kinds = list(result["table"][0]["ms"])
        rows = [
            [
                f"{row['dtype']}, {row['tokens']} tokens",
                *(f"{row['ms'][kind]:.1f} ms" for kind in kinds),
                *(f"{row['trees over'][kind]['median']:.2f}x" for kind in kinds[1:]),
            ]
            for row in result["table"]
        ]
        parts.append(
            f"{result['layers']} layers of 768, one text, {result['machine']}, commit {result['commit']} "
            f"([{name}](RESULTS/{name})); medians, ratios within a round:\n\n"
            + table(["", *kinds, *(f"over {kind}" for kind in kinds[1:])], rows)
        )
    return "\n".join(parts) or "Not measured yet.\n"
