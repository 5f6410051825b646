import gzip
import lzma
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from shoestring.errors import MissingDependencyError, RequestError
from shoestring.transformer.batching import TokenPairs
from shoestring.transformer.cleaning import clean
from shoestring.transformer.corpus import read_corpus
from shoestring.transformer.tokenizer import encode_all, train_tokenizer

LANGUAGES = ("en", "de")
data = pytest.mark.skipif("SHOESTRING_DATA" not in os.environ, reason="the data sets are not here")


@pytest.fixture
def files(tmp_path):
    (tmp_path / "train.en").write_text("A dog.\nTwo\u2028cats.\n\n")
    (tmp_path / "train.de").write_text("Ein Hund.\r\nZwei Katzen.\n\n")
    return f"{tmp_path}/train.{{}}"


def test_two_files(files):
    assert read_corpus(files, LANGUAGES) == [
        ("A dog.", "Ein Hund."),
        ("Two\u2028cats.", "Zwei Katzen."),
        ("", ""),
    ]
    assert read_corpus(f"{files}[1:2]", LANGUAGES) == [("Two\u2028cats.", "Zwei Katzen.")]
    assert read_corpus(files, ("de", "en"))[0] == ("Ein Hund.", "A dog.")


@pytest.mark.parametrize(("suffix", "opened"), [("", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_tsv_plain_and_packed(tmp_path, suffix, opened):
    path = tmp_path / f"pairs.en-de.tsv{suffix}"
    with opened(path, "wb") as file:
        file.write(b"A dog.\tEin Hund.\nYes\tJa\n")
    assert read_corpus(str(path), LANGUAGES) == [("A dog.", "Ein Hund."), ("Yes", "Ja")]
    assert read_corpus(f"{path}[1:]", ("de", "en")) == [("Ja", "Yes")]


def test_what_cannot_be_read_is_said(files, tmp_path):
    Path(files.replace("{}", "de")).write_text("Ein Hund.\n")
    with pytest.raises(RequestError, match=r"has 3 lines and .* has 1: they are not parallel"):
        read_corpus(files, LANGUAGES)
    (tmp_path / "x.tsv").write_text("a\tb\nno tab\n")
    with pytest.raises(RequestError, match="line 2: 0 tabs"):
        read_corpus(f"{tmp_path}/x.tsv", LANGUAGES)
    (tmp_path / "y.tsv.xz").write_bytes(b"not xz")
    with pytest.raises(RequestError, match=r"not a whole .xz"):
        read_corpus(f"{tmp_path}/y.tsv.xz", LANGUAGES)
    (tmp_path / "z.tsv").write_bytes(b"a\tb\n\xff\tc\n")
    with pytest.raises(RequestError, match="line 2: not UTF-8"):
        read_corpus(f"{tmp_path}/z.tsv", LANGUAGES)
    for name, words in {
        "nowhere/train.{}": "is not there",
        "train.txt": "hf:ID/CONFIGURATION/SPLIT",
        "hf:wmt14": "is not hf:ID",
        "generated:copies[0:5]": "known: copy, reverse, trees",
        "generated:copy": r"generated:copy\[0:20000\]",
        f"{tmp_path}/x.tsv[7:]": "tabs",
    }.items():
        with pytest.raises(RequestError, match=words):
            read_corpus(name, LANGUAGES)


def test_hub_data_sets_need_datasets():
    try:
        import datasets  # noqa: F401
    except ImportError:
        with pytest.raises(MissingDependencyError, match=r"shoestring\[train\]"):
            read_corpus("hf:wmt/wmt14/de-en/train", LANGUAGES)


def test_generated_pairs_are_always_the_same():
    pairs = read_corpus("generated:reverse[5:8]", LANGUAGES)
    assert pairs == read_corpus("generated:reverse[0:8]", LANGUAGES)[5:]
    for source, target in pairs:
        assert source.split() == target.split()[::-1]


def test_cleaning_reports_what_it_leaves_out():
    pairs = [("a b", "c d"), ("a b", "c d"), ("", "x"), ("A dog runs!", "Ein Hund"), ("w " * 300, "w " * 300),
             ("short", "x" * 200), ("good", "gut")]  # fmt: skip
    kept, report = clean(pairs, ["a DOG runs."])
    assert kept == [("a b", "c d"), ("good", "gut")]
    assert report.as_dict() == {
        "pairs": 7, "empty": 1, "duplicate": 1, "in_test": 1, "too_long": 1, "unequal": 1, "kept": 2,
    }  # fmt: skip
    assert "1 in test" in str(report)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Ein Hund läuft.", "A dog runs.", "dogs and Hunde"] * 3, 300)


@pytest.mark.parametrize("text", ["A dog runs.", "Straße — naïve 猫 🐈\u200d⬛", "  two  spaces", "</s> <s>"])
def test_no_character_is_unknown(tokenizer, text):
    ids = encode_all(tokenizer, [text])[0]
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text.strip()


def test_bpe_dropout_varies_and_means_the_same(tokenizer):
    texts = ["A dog runs and dogs run."] * 20
    noisy = encode_all(tokenizer, texts, 0.5)
    assert len({tuple(ids) for ids in noisy}) > 5
    assert {tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in noisy} == {texts[0]}
    assert encode_all(tokenizer, texts[:1]) == encode_all(tokenizer, texts[:1])


def test_vocabulary_too_small_for_the_bytes():
    with pytest.raises(RequestError, match=r"data.vocabulary is 100; at least 259"):
        train_tokenizer(["a"], 100)


def test_buckets_hold_each_pair_once_and_few_tokens_more():
    draw = np.random.default_rng(0)
    variants = [[([5] * int(a), [6] * int(b)) for a, b in draw.integers(1, 40, (500, 2))] for _ in range(3)]
    pairs = TokenPairs(variants, 0, "cpu")
    plan = pairs.plan(256)
    batches = plan(random.Random(1))
    assert sorted(index % 500 for batch in batches for index in batch) == list(range(500))
    assert len({index // 500 for batch in batches for index in batch}) == 3
    assert plan(random.Random(1)) == batches != plan(random.Random(2))
    padded = real = 0
    for batch in batches:
        tensors = pairs.collate(batch)
        assert tensors["labels"].numel() <= 256
        assert tensors["input_ids"].numel() <= 256
        padded += int(tensors["labels"].numel())
        real += max(int((tensors["labels"] != -100).sum()), int(tensors["attention_mask"].sum()))
    assert real > 0.6 * padded
    with pytest.raises(RequestError, match="raise batch_tokens"):
        pairs.plan(20)


def test_collate_pads_on_the_right():
    pairs = TokenPairs([[([4, 5, 2], [7, 2]), ([6, 2], [8, 9, 9, 2])]], 0, "cpu")
    batch = pairs.collate([1, 0])
    assert batch["input_ids"].tolist() == [[6, 2, 0], [4, 5, 2]]
    assert batch["attention_mask"].tolist() == [[True, True, False], [True] * 3]
    assert batch["labels"].tolist() == [[8, 9, 9, 2], [7, 2, -100, -100]]
    assert batch["labels"].dtype == torch.long


@data
def test_multi30k_and_libreoffice_are_read():
    pairs = read_corpus("translation/multi30k.train.{}", LANGUAGES)
    tests = read_corpus("translation/multi30k.test_2016.{}", LANGUAGES)
    assert (len(pairs), len(tests)) == (29000, 1000)
    _, report = clean(pairs, [source for source, _ in tests])
    assert report.kept > 28900
    assert len(read_corpus("translation/libreoffice_help.en-de.tsv.xz", LANGUAGES)) == 21568
