import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoestring.errors import RequestError
from shoestring.transformer.parsing.brackets import bracket_score
from shoestring.transformer.parsing.grammar import random_tree
from shoestring.transformer.parsing.trees import Tree, bracketed, leaves, linearized, read_tree, repaired

DOG = "(S (NP (DT the) (NN dog)) (VP (VBD barked)))"


def test_reads_and_writes_penn_brackets():
    tree = read_tree(DOG)
    assert leaves(tree) == ["the", "dog", "barked"]
    assert bracketed(tree) == DOG
    assert bracketed(read_tree("( (S\n  (NP (NN dog)) ) )")) == "(S (NP (NN dog)))"
    assert linearized(tree) == "(S (NP DT NN ) (VP VBD ) )"


@pytest.mark.parametrize("text", ["", "dog", "(S (NP dog)", "(S (NN dog)) (S x)", "(S (NN dog) cat)"])
def test_what_is_no_tree_is_refused(text):
    with pytest.raises(RequestError):
        read_tree(text)


@given(st.integers(0, 10**6))
def test_linear_form_of_a_tree_is_that_tree(seed):
    tree = random_tree(random.Random(seed))
    assert repaired(linearized(tree), leaves(tree)) == tree
    assert read_tree(bracketed(tree)) == tree


@given(
    st.lists(st.sampled_from(["(S", "(NP", ")", "NN", "DT", "(", "x)y"])),
    st.lists(st.just("w"), min_size=1, max_size=6),
)
def test_anything_written_is_repaired_to_a_tree_over_the_words(tokens, words):
    tree = repaired(" ".join(tokens), words)
    assert leaves(tree) == words
    again = read_tree(bracketed(tree))
    assert leaves(again) == words


def test_repairs():
    words = ["the", "dog", "barked"]
    assert bracketed(repaired("(S (NP DT NN ) (VP VBD", words)) == DOG
    assert bracketed(repaired("(S (NP DT NN ) (VP VBD ) ) ) )", words)) == DOG
    assert bracketed(repaired("(S (NP DT NN ) (PP ) (VP VBD NN NN ) )", words)) == DOG
    assert bracketed(repaired("(S (NP DT NN ) )", words)) == "(S (NP (DT the) (NN dog)) (XX barked))"
    assert bracketed(repaired("", words)) == "(S (XX the) (XX dog) (XX barked))"


def test_bracket_scores():
    gold = read_tree(DOG)
    flat = read_tree("(S (DT the) (NN dog) (VP (VBD barked)))")
    same = bracket_score([gold], [gold])
    assert (same.precision, same.recall, same.f1, same.exact) == (100, 100, 100, 100)
    score = bracket_score([flat, gold], [gold, gold])  # S and VP of 3, then 3 of 3
    assert score.precision == pytest.approx(100)
    assert score.recall == pytest.approx(100 * 5 / 6)
    assert score.exact == 50


def test_tags_and_repeated_brackets_count_as_they_should():
    unary = Tree("S", [Tree("S", [Tree("NN", word="x")])])
    once = Tree("S", [Tree("JJ", word="x")])
    score = bracket_score([unary], [once])
    assert (score.precision, score.recall) == (50, 100)
