"""The search on a GPU: replayed CUDA graphs write what plain steps write."""

import pytest
import torch

from shoestring.transformer.config import preset
from shoestring.transformer.model import Transformer
from shoestring.transformer.search import SearchOptions, search

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("name", ["paper-tiny", "modern-tiny"])
@pytest.mark.parametrize("beam", [1, 4])
def test_graphs_write_what_plain_steps_write(name, beam):
    torch.manual_seed(3)
    model = Transformer(preset(name, vocab_size=200)).cuda().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.6) if weight.ndim > 1 else weight.add_(torch.randn_like(weight) * 0.2)
    lengths = torch.tensor([9, 4, 7, 9, 1, 6], device="cuda")
    mask = torch.arange(9, device="cuda") < lengths[:, None]
    ids = torch.randint(3, 200, (6, 9), device="cuda").masked_fill(~mask, 0)
    found = [
        search(model, ids, mask, SearchOptions(beam=beam, extra_length=60, graphs=graphs))
        for graphs in (True, False)
    ]
    assert [[h.tokens for h in row] for row in found[0]] == [[h.tokens for h in row] for row in found[1]]
    assert len({len(row[0].tokens) for row in found[0]}) > 1
