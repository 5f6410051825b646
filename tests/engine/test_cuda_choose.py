"""Choosing tokens on the device gives what `sampling` gives: arg-max, the likeliest in order, and the same draws."""

import math

import pytest
import torch
from interpreted_triton import DEVICE

from shoestring.engine.cuda.choose import NOT_FINITE, Candidates, choose, choose_twin
from shoestring.engine.cuda.layout import Bucket, DeviceLayout, HostLayout
from shoestring.engine.sampling import SamplingOptions, next_token
from shoestring.engine.tokentree import TokenTree

V = 5003


def chosen(
    logits: torch.Tensor, top_k: int = 1, sampling: dict[int, SamplingOptions] | None = None, rows: int = 4
) -> tuple[list[int], list[list[int]]]:
    """Both bodies' choice for two slots, the first with two rows at 40, the second with `rows - 2` at 7."""
    trees = {0: TokenTree.chain([0, 0]), 1: TokenTree([0] * (rows - 2), [-1, *[0] * (rows - 3)])}
    layout = DeviceLayout.allocate(Bucket(2, rows + 1), DEVICE)
    host = HostLayout(layout)
    host.fill(trees, {0: 40, 1: 7}, {0: 0, 1: 1}, sampling)
    host.send()
    logits = logits.to(DEVICE)
    results = []
    for kernel in (True, False):
        drawn = torch.full((rows + 1,), 77, dtype=torch.int32, device=DEVICE)
        top = torch.full((rows + 1, top_k), 77, dtype=torch.int32, device=DEVICE)
        if kernel:
            choose(logits, layout, Candidates.allocate(rows + 1, V, top_k, DEVICE), drawn, top)
        else:
            choose_twin(logits, layout, drawn, top)
        assert drawn[rows] == 77, "padding is left alone"
        results.append((drawn[:rows].tolist(), top[:rows].tolist()))
    assert results[0] == results[1]
    return results[0]


@pytest.mark.parametrize("top_k", [1, 5, 16])
def test_likeliest_tokens_with_ties_in_token_order(top_k: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, V).mul_(4).round_()  # many ties, within and across tiles
    drawn, top = chosen(logits, top_k)
    expected = logits[:4].sort(descending=True, stable=True).indices[:, :top_k].tolist()
    assert top == expected
    assert drawn == [row[0] for row in expected]


def test_draws_are_those_of_sampling_for_each_rows_position_and_temperature() -> None:
    torch.manual_seed(1)
    logits = torch.randn(13, V) * 2
    warm = SamplingOptions(temperature=1.3, seed=-4, sample=3)
    cool = SamplingOptions(temperature=0.4, seed=2**63 + 5)
    drawn, _ = chosen(logits, sampling={0: warm, 1: cool}, rows=12)
    positions = [41, 42, 8, *[9] * 9]
    options = [warm] * 2 + [cool] * 10
    expected = [next_token(logits[i], options[i], positions[i]) for i in range(12)]
    assert drawn == expected
    greedy = [int(token) for token in logits[:12].argmax(-1)]
    assert drawn != greedy
    mixed, _ = chosen(logits, sampling={0: SamplingOptions(), 1: cool}, rows=12)
    assert mixed == greedy[:2] + expected[2:]


def test_rows_that_are_not_finite_are_told_apart() -> None:
    logits = torch.full((5, V), -math.inf)
    logits[0, 3000] = math.nan
    logits[0, 2] = 1
    logits[1, 17] = math.inf
    logits[2, [4000, 9]] = 0.5  # most tokens forbidden, two allowed
    drawn, top = chosen(logits, 5)
    assert drawn == [NOT_FINITE, NOT_FINITE, 9, NOT_FINITE]
    assert top[0] == top[1] == top[3] == [NOT_FINITE] * 5
    assert top[2] == [9, 4000, 0, 1, 2]
