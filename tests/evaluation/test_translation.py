import pytest
import sacrebleu

from shoestring.errors import RequestError
from shoestring.evaluation.translation import paired_bootstrap, score_translations

REFERENCES = [f"Der Hund Nummer {n} läuft über die Straße und bellt ." for n in range(40)]
GOOD = [text.replace("bellt", "ruft") if n % 4 == 0 else text for n, text in enumerate(REFERENCES)]
BAD = [text.replace("läuft über", "geht auf") for text in GOOD]


def test_scores_are_sacrebleus():
    score = score_translations(GOOD, REFERENCES, samples=50)
    assert score.bleu == pytest.approx(sacrebleu.corpus_bleu(GOOD, [REFERENCES]).score)
    assert score.chrf == pytest.approx(sacrebleu.corpus_chrf(GOOD, [REFERENCES]).score)
    assert "tok:13a" in score.signatures["bleu"]
    assert "case:lc" in score.signatures["bleu_lowercased"]
    low, high = score.bleu_interval
    assert low < score.bleu < high
    assert score_translations(
        [t.replace("Hund", "HUND") for t in REFERENCES], REFERENCES, samples=2
    ).bleu_lowercased == pytest.approx(100)


def test_paired_difference_is_seen_where_it_is():
    found = paired_bootstrap(BAD, GOOD, REFERENCES, samples=200)
    assert found.difference == pytest.approx(found.second - found.first)
    assert 0 < found.interval[0] < found.difference < found.interval[1]
    assert found.p_value < 0.05
    none = paired_bootstrap(GOOD, GOOD, REFERENCES, samples=50)
    assert (none.difference, none.p_value) == (0, 1)


def test_unequal_numbers():
    with pytest.raises(RequestError, match="39 translations and 40 references"):
        score_translations(GOOD[1:], REFERENCES)
    with pytest.raises(RequestError, match="0 translations"):
        score_translations([], [])
