"""Attention as pictures, head by head with the tokens (the last figures of arXiv 1706.03762): PNG or one HTML page."""

import html
from pathlib import Path
from typing import Any

from torch import Tensor

from shoestring.errors import RequestError
from shoestring.training.plots import new_figure

__all__ = ["draw_attention"]

_KINDS = {"encoder": ("source", "source"), "decoder": ("read", "read"), "cross": ("read", "source")}
_TITLES = {
    "encoder": "source on source",
    "decoder": "translation on itself",
    "cross": "translation on source",
}


def draw_attention(attention: dict[str, Any], path: Path) -> Path:
    """Draw what `Translator.attention` gave: every kind, layer and head, rows looking at columns.

    Raises:
        RequestError: the file's name ends neither in .png nor in .html.
        MissingDependencyError: a PNG, and matplotlib is not installed.
    """
    if path.suffix == ".html":
        path.write_text(_page(attention), encoding="utf-8")
    elif path.suffix == ".png":
        _picture(attention, path)
    else:
        raise RequestError(f"{path}: attention is drawn as .png or .html")
    return path


def _picture(attention: dict[str, Any], path: Path) -> None:
    rows = [(kind, layer) for kind in _KINDS for layer in range(len(attention[kind]))]
    heads = attention["cross"].shape[1]
    size = 1.2 + 0.14 * max(len(attention["source"]), len(attention["read"]))
    figure, axes = new_figure(size * heads, size * len(rows), heads, len(rows))
    for row, (kind, layer) in enumerate(rows):
        down, across = (attention[side] for side in _KINDS[kind])
        for head in range(heads):
            cell = axes[row, head]
            cell.imshow(
                attention[kind][layer, head].float().cpu().numpy(),
                vmin=0,
                vmax=1,
                cmap="Blues",
                aspect="auto",
            )
            cell.set_xticks(range(len(across)), [_plain(t) for t in across], rotation=90, fontsize=6)
            cell.set_yticks(range(len(down)), [_plain(t) for t in down], fontsize=6)
            cell.set_title(f"{_TITLES[kind]}, layer {layer + 1}, head {head + 1}", fontsize=7)
    figure.savefig(path, dpi=100)


def _plain(token: str) -> str:
    """A token as matplotlib shows it: a dollar sign would begin a formula."""
    return token.replace("$", r"\$")


def _page(attention: dict[str, Any]) -> str:
    parts = [
        "<!doctype html><meta charset=utf-8><title>Attention</title><style>"
        "body{font:12px sans-serif}table{border-collapse:collapse;display:inline-table;margin:4px 12px}"
        "td{width:16px;height:16px;padding:0}th{font-weight:400;padding:0 3px;text-align:right;white-space:nowrap}"
        "thead th{writing-mode:vertical-rl;text-align:left}</style>"
    ]
    for kind, (down, across) in _KINDS.items():
        parts.append(f"<h2>{_TITLES[kind]}</h2>")
        for layer, heads in enumerate(attention[kind]):
            parts.append(f"<h3>layer {layer + 1}</h3>")
            parts += [
                _table(weights, attention[down], attention[across], head)
                for head, weights in enumerate(heads)
            ]
    return "".join(parts)


def _table(weights: Tensor, down: list[str], across: list[str], head: int) -> str:
    top = "".join(f"<th>{html.escape(token)}" for token in across)
    rows = "".join(
        f"<tr><th>{html.escape(token)}"
        + "".join(f'<td title="{w:.2f}" style="background:rgba(8,48,140,{w:.3f})">' for w in row)
        for token, row in zip(down, weights.tolist(), strict=True)
    )
    return f"<table><caption>head {head + 1}</caption><thead><tr><th>{top}</thead>{rows}</table>"
