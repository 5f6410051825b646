"""Text to rows to hidden tokens: nothing is lost, nothing special is hidden, and a resumed run sees the same."""

import lzma
import random

import numpy as np
import pytest
import torch

from shoestring.errors import RequestError
from shoestring.fastff.masking import MaskedRows, mask_tokens
from shoestring.fastff.pieces import MASK, SEP, learn_pieces
from shoestring.fastff.text_source import fingerprint, read_documents
from shoestring.fastff.token_rows import is_held_out, prepare_corpus, rows_of

WORDS = "the old sailor counted seven small islands before dawn and nobody believed him again".split()  # noqa: SIM905


def corpus(documents=120, seed=0):
    draw = random.Random(seed)
    return [[" ".join(draw.choices(WORDS, k=9)) for _ in range(draw.randint(1, 5))] for _ in range(documents)]


@pytest.fixture(scope="module")
def tokenizer():
    return learn_pieces((text for document in corpus() for text in document), 90)


def hidden(tokenizer, input_ids, count=8, **options):
    generator = torch.Generator().manual_seed(5)
    special = torch.tensor(tokenizer.all_special_ids)
    return mask_tokens(
        input_ids, count, mask_id=tokenizer.mask_token_id, special=special, vocabulary=len(tokenizer),
        generator=generator, **options,
    )  # fmt: skip


@pytest.mark.parametrize("suffix", [".txt", ".txt.xz"])
def test_documents_are_parted_by_blank_lines(tmp_path, suffix):
    path = tmp_path / f"text{suffix}"
    data = b"one\ntwo\n\n\nthree\n"
    path.write_bytes(lzma.compress(data) if suffix.endswith("xz") else data)
    assert list(read_documents([str(path)])) == [["one", "two"], ["three"]]
    assert list(read_documents([f"lines:{path}"])) == [["one"], ["two"], ["three"]]


def test_long_lines_are_cut_between_words(tmp_path):
    path = tmp_path / "text.txt"
    line = "word " * 3000
    path.write_text(line)
    (document,) = read_documents([str(path)])
    assert len(document) > 1
    assert " ".join(document).split() == line.split()


@pytest.mark.parametrize(
    ("content", "message"), [(b"fine\n\xff\n", "line 2: not UTF-8"), (b"\xfd7zXZ\x00torn", "whole .xz file|cannot be read")]
)  # fmt: skip
def test_broken_files_are_said(tmp_path, content, message):
    path = tmp_path / ("a.xz" if content.startswith(b"\xfd") else "a.txt")
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message):
        list(read_documents([str(path)]))


def test_missing_file_is_said(monkeypatch):
    monkeypatch.setenv("SHOESTRING_DATA", "/nowhere")
    with pytest.raises(RequestError, match="not in SHOESTRING_DATA"):
        fingerprint(["corpus/none.txt"])


def test_rows_hold_the_whole_stream(tokenizer, tmp_path):
    documents = corpus()
    prepared = prepare_corpus(tmp_path / "rows", documents, tokenizer, length=16, held_out=0.2)
    end = tokenizer.sep_token_id
    for part, rows in (("train", prepared.train), ("held_out", prepared.held_out)):
        own = [d for d in documents if is_held_out(d, 0.2) == (part == "held_out")]
        stream = [t for d in own for text in d for t in tokenizer.encode(text, add_special_tokens=False)]
        assert 0 < len(own) < len(documents)
        flat = rows.flatten()
        assert [int(t) for t in flat if t != end] == stream[: int((flat != end).sum())]
        assert 0 <= len(stream) + len(own) - len(flat) < 16
        assert int((flat == end).sum()) > len(own) - 6
    assert prepared.about["dtype"] == "uint16"
    again = prepare_corpus(tmp_path / "rows", [], tokenizer, length=16, held_out=0.2)  # not read again
    assert np.array_equal(again.train, prepared.train)


def test_a_text_cannot_end_its_document(tokenizer):
    rows = rows_of([["the old [SEP] sailor"]] * 4, tokenizer, tokenizer.sep_token_id, 4)
    assert int((rows == tokenizer.sep_token_id).sum()) <= 4


def test_too_little_text_is_said(tokenizer, tmp_path):
    with pytest.raises(RequestError, match="one row of 64 is the least"):
        prepare_corpus(tmp_path / "rows", corpus(2), tokenizer, length=64, held_out=0.5)
    assert not (tmp_path / "rows").exists()


def test_hidden_tokens_are_as_many_as_asked_and_none_is_special(tokenizer):
    ids = torch.randint(4, len(tokenizer), (50, 32))
    ids[:, ::7] = tokenizer.sep_token_id
    shown, positions, labels = hidden(tokenizer, ids)
    assert positions.shape == labels.shape == (50, 8)
    assert torch.equal(labels, ids.gather(1, positions))
    assert not (labels == tokenizer.sep_token_id).any()
    assert (positions.diff(dim=1) > 0).all()
    elsewhere = torch.ones_like(ids, dtype=torch.bool).scatter(1, positions, False)
    assert torch.equal(shown[elsewhere], ids[elsewhere])
    fates = shown.gather(1, positions)
    masked = float((fates == tokenizer.mask_token_id).float().mean())
    kept = float((fates == labels).float().mean())
    assert masked == pytest.approx(0.8, abs=0.07)
    assert kept == pytest.approx(0.1, abs=0.05)


def test_rows_with_too_few_words_have_fewer_labels(tokenizer):
    ids = torch.full((1, 32), tokenizer.sep_token_id)
    ids[0, :3] = 10
    shown, _, labels = hidden(tokenizer, ids, corrupt=False)
    assert int((labels != -100).sum()) == 3
    assert shown[0].tolist() == [tokenizer.mask_token_id] * 3 + [tokenizer.sep_token_id] * 29


def test_batches_are_a_function_of_seed_and_epoch(tokenizer):
    rows = np.random.default_rng(0).integers(4, len(tokenizer), (20, 16)).astype(np.uint16)

    def batches(seed):
        hider = MaskedRows(rows, tokenizer, share=0.25, corrupt=True, device="cpu", seed=seed)
        plan = hider.plan(8)
        return [
            hider.collate([hider[n] for n in b])
            for epoch in (0, 1)
            for b in plan(random.Random(f"0/{epoch}"))
        ]

    first, again, other = batches(0), batches(0), batches(1)
    assert len(first) == 4
    assert all(torch.equal(a[k], b[k]) for a, b in zip(first, again, strict=True) for k in a)
    assert not torch.equal(first[0]["masked_positions"], other[0]["masked_positions"])
    assert not torch.equal(first[0]["masked_positions"], first[2]["masked_positions"])


def test_tokenizers_end_texts_and_pairs(tokenizer):
    assert tokenizer("the old", "sailor")["input_ids"].count(tokenizer.sep_token_id) == 2
    assert tokenizer.convert_ids_to_tokens(tokenizer.mask_token_id) == MASK
    bpe = learn_pieces([text for document in corpus() for text in document], 300, kind="bpe")
    assert bpe.decode(bpe.encode("The Ökonom")).strip() == f"the ökonom{SEP}"
    with pytest.raises(RequestError, match="needs at least 260"):
        learn_pieces(["a"], 100, kind="bpe")
