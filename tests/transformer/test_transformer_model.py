import math

import pytest
import torch
from lively import lively

from shoestring.errors import RequestError, UnsupportedModelError
from shoestring.transformer.config import PRESETS, preset
from shoestring.transformer.layers import sinusoids
from shoestring.transformer.marian import as_marian
from shoestring.transformer.model import Transformer


def millions(name="paper-base", **changes):
    with torch.device("meta"):
        return Transformer(preset(name, vocab_size=37000, **changes)).num_parameters() / 1e6


@pytest.mark.parametrize(
    ("changes", "paper"),
    [({"layers": 2}, -29), ({"d_k": 16}, -7), ({"d_ff": 4096}, 25), ({"positions": "learned"}, 0)],
)
def test_parameters_differ_as_in_table_3(changes, paper):
    """Base and N=2, d_k=16, d_ff=4096: 65, 36, 58, 90 million."""
    assert millions(**changes) - millions() == pytest.approx(
        paper, abs=1.1 if "positions" in changes else 0.6
    )


def test_sizes_of_the_presets():
    assert millions() == pytest.approx(63, abs=1)
    assert millions("paper-big") == pytest.approx(214, abs=2)
    for shape in ("tiny", "iwslt", "base"):
        assert millions(f"modern-{shape}") == pytest.approx(millions(f"paper-{shape}"), rel=0.01)


@pytest.mark.parametrize("name", ["paper-tiny", "modern-tiny"])
def test_untrained_loss_is_that_of_guessing(name):
    torch.manual_seed(0)
    model = Transformer(preset(name, vocab_size=2000, dropout=0.0, label_smoothing=0.0))
    ids = torch.randint(3, 2000, (8, 12))
    assert model(ids, labels=ids.flip(1)).loss.item() == pytest.approx(math.log(2000), abs=0.8)


def test_paper_model_is_marian_mt(batch):
    """The same weights in transformers' own encoder-decoder give the same logits."""
    ids, mask = batch
    model = lively("paper-tiny")
    marian = as_marian(model)
    target = torch.randint(3, 40, (6, 5))
    ours = model(ids, mask, decoder_input_ids=target).logits
    theirs = marian(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=target).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    with pytest.raises(UnsupportedModelError, match="pre, rms"):
        as_marian(lively("modern-tiny"))


def test_padding_changes_nothing(model, batch):
    ids, mask = batch
    target = torch.randint(3, 40, (6, 5))
    together = model(ids, mask, decoder_input_ids=target).logits
    for row in range(len(ids)):
        alone = model(ids[row : row + 1, : mask[row].sum()], decoder_input_ids=target[row : row + 1]).logits[
            0
        ]
        torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-12)


def test_padded_labels_do_not_count(model, batch):
    ids, mask = batch
    labels = torch.randint(3, 40, (6, 5))
    short = model(ids, mask, labels=labels).loss
    longer = torch.cat([labels, torch.full((6, 3), -100)], dim=1)
    torch.testing.assert_close(model(ids, mask, labels=longer).loss, short)
    summed = model(ids, mask, labels=longer, num_items_in_batch=torch.tensor(60)).loss
    torch.testing.assert_close(summed, short / 2)


def test_no_target_position_sees_a_later_one(model, batch):
    ids, mask = batch
    target = torch.randint(3, 40, (6, 5))
    changed = target.clone()
    changed[:, 3:] = 7
    before, after = (model(ids, mask, decoder_input_ids=t).logits[:, :3] for t in (target, changed))
    torch.testing.assert_close(before, after, rtol=0, atol=1e-12)


def test_one_matrix_embeds_and_predicts_and_survives_saving(model, batch, tmp_path):
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert again.encoder.embedding.weight is again.decoder.embedding.weight is again.shared.weight
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    ids, mask = batch
    # Loaded weights lie at other addresses, to which some processors' products are not indifferent.
    torch.testing.assert_close(
        again(ids, mask, labels=ids).logits, model(ids, mask, labels=ids).logits, rtol=0, atol=1e-12
    )


def test_captured_attention_is_a_distribution_and_changes_nothing(model, batch):
    ids, mask = batch
    seen = model(ids, mask, labels=ids, output_attentions=True)
    torch.testing.assert_close(seen.logits, model(ids, mask, labels=ids).logits, rtol=0, atol=1e-12)
    for weights in (*seen.encoder_attentions, *seen.decoder_attentions, *seen.cross_attentions):
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    assert len(seen.encoder_attentions) == 2
    assert seen.encoder_attentions[0].shape == (6, 4, 9, 9)
    assert seen.cross_attentions[1][1, :, :, 4:].abs().max().item() == 0  # row 1 has four tokens
    assert seen.decoder_attentions[0].triu(1).abs().max().item() == 0


def test_sinusoids_are_the_papers():
    table = sinusoids(50, 16)
    for position, place in ((0, 0), (3, 4), (49, 10)):
        angle = position / 10000 ** (place / 16)
        assert float(table[position, place]) == pytest.approx(math.sin(angle), abs=1e-6)
        assert float(table[position, place + 1]) == pytest.approx(math.cos(angle), abs=1e-6)


def test_unknown_preset_names_the_nearest():
    with pytest.raises(RequestError, match="did you mean 'paper-base'"):
        preset("paper-bas")
    with pytest.raises(RequestError, match="must be even"):
        preset("paper-tiny", d_model=33, heads=3)
    assert len(PRESETS) == 8
