"""How often look-ahead rows foresee what the frozen model itself would say next: by position and rank."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shoestring.finetuning.pass_model import Example, LookAheadModel, collate
from shoestring.training.plots import new_figure

__all__ = ["CANDIDATES", "Acceptance", "measure_acceptance", "plot_acceptance"]

CANDIDATES = 4
_SMOOTHING = 4.0


@dataclass(frozen=True)
class Acceptance:
    """Of `insertions` chains of look-ahead rows, what came true.

    Args:
        matches: [L][rank]: the model's own next token was this candidate (whatever was foreseen before it).
        chain: [L]: all positions up to this one were foreseen by the first candidates.
        tree: [L]: ... by any of the candidates.
        conditional: [L][rank]: the chance that this candidate is right where all before it were among the candidates.
    """

    insertions: int
    matches: list[list[float]]
    chain: list[float]
    tree: list[float]
    conditional: list[list[float]]

    def summary(self) -> dict[str, Any]:
        """Plain data. Tokens per step are those of a drafting step: a chain's, and the most that a tree can reach."""
        return {
            "insertions": self.insertions,
            "match_by_position": [round(rates[0], 4) for rates in self.matches],
            "match_among_candidates": [round(sum(rates), 4) for rates in self.matches],
            "chain_tokens_per_step": round(1 + sum(self.chain), 4),
            "tree_tokens_per_step": round(1 + sum(self.tree), 4),
        }


@torch.no_grad()
def measure_acceptance(
    model: LookAheadModel, examples: Sequence[Example], batch_size: int, insertions: int, seed: int = 0
) -> Acceptance:
    """Measure on held-out examples, at seeded random points; only points with all positions inside the text count."""
    tokens = len(model.look_ahead)
    device = model.look_ahead.device
    hits = torch.zeros(tokens, CANDIDATES)
    given = torch.zeros(tokens, CANDIDATES)
    reached = torch.zeros(tokens)
    chain = torch.zeros(tokens)
    tree = torch.zeros(tokens)
    count = 0
    chance = random.Random(seed)
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    for start in range(0, len(ordered), batch_size):
        batch = collate(ordered[start : start + batch_size], tokens, insertions, chance)
        drafts, teacher = model.predictions(batch["input_ids"].to(device), batch["points"].to(device))
        whole = (batch["labels"] != -100).all(-1)  # [B, M]
        if not bool(whole.any()):
            continue
        whole = whole.to(device)
        wanted = min(CANDIDATES, drafts.shape[-1])
        candidates = drafts[whole].topk(wanted, dim=-1).indices
        right = (candidates == teacher[whole].argmax(-1, keepdim=True)).float().cpu()  # [N, L, rank]
        right = torch.nn.functional.pad(right, (0, CANDIDATES - wanted))
        alive = right.any(-1).float().cumprod(-1)  # all up to and including this position
        before = torch.cat([torch.ones(len(right), 1), alive[:, :-1]], dim=1)
        count += len(right)
        hits += right.sum(0)
        given += (right * before[..., None]).sum(0)
        reached += before.sum(0)
        chain += right[..., 0].cumprod(-1).sum(0)
        tree += alive.sum(0)
    matches = hits / max(1, count)
    # Deep positions are seldom reached: lean on the unconditional rate there.
    conditional = (given + _SMOOTHING * matches) / (reached + _SMOOTHING)[:, None]
    return Acceptance(
        count,
        matches.tolist(),
        (chain / max(1, count)).tolist(),
        (tree / max(1, count)).tolist(),
        [[round(rate, 4) for rate in rates] for rates in conditional.tolist()],
    )


def plot_acceptance(path: Path, curves: dict[str, Acceptance]) -> None:
    """Draw the match rate by position, first candidate and any candidate, of each set of embeddings."""
    figure, axes = new_figure(6, 4)
    for name, acceptance in curves.items():
        positions = range(1, len(acceptance.matches) + 1)
        (line,) = axes[0, 0].plot(
            positions, [rates[0] for rates in acceptance.matches], marker="o", label=name
        )
        axes[0, 0].plot(
            positions,
            [sum(rates) for rates in acceptance.matches],
            marker=".",
            linestyle="--",
            color=line.get_color(),
            label=f"{name}, any of {CANDIDATES}",
        )
    axes[0, 0].set_xlabel("tokens ahead, behind the next one")
    axes[0, 0].set_ylabel("foreseen")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].grid(alpha=0.3)
    axes[0, 0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
