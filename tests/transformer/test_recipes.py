from pathlib import Path

import pytest
import torch

from shoestring.errors import RequestError
from shoestring.training.recipe import read_recipe, validated
from shoestring.transformer.model import Transformer
from shoestring.transformer.recipe import TransformerRecipe

RECIPES = Path(__file__).parent.parent.parent / "recipes"
ALL = [path for path in sorted(RECIPES.rglob("*.yaml")) if "task: transformer" in path.read_text()]
# Table 3's parameters in millions, base first.
TABLE_3 = {
    "b-16-keys": 58, "b-32-keys": 60, "c-2-layers": 36, "c-4-layers": 50, "c-8-layers": 80, "c-256-wide": 28,
    "c-1024-wide": 168, "c-1024-inner": 53, "c-4096-inner": 90, "a-1-head": 65, "a-32-heads": 65,
}  # fmt: skip


def load(path, *overrides):
    return validated(TransformerRecipe, read_recipe(path, overrides))


def millions(recipe):
    with torch.device("meta"):
        return Transformer(recipe.model.config(37000, 0.1)).num_parameters() / 1e6


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recipe_is_valid_and_its_first_line_is_its_command(path):
    load(path)
    first = path.read_text().splitlines()[0]
    assert first == f"# shoestring train {path.relative_to(RECIPES.parent)}"
    assert len(TransformerRecipe.model_fields) <= 25


@pytest.mark.parametrize(("row", "paper"), TABLE_3.items())
def test_rows_of_table_3_have_the_papers_sizes(row, paper):
    """As differences from base: the paper's 65 million count a vocabulary that it does not state exactly."""
    difference = millions(load(RECIPES / "table3" / f"{row}.yaml")) - millions(
        load(RECIPES / "wmt14-en-de-base.yaml")
    )
    # A width changes the embeddings too, and so the part of the vocabulary that is not ours.
    assert difference == pytest.approx(paper - 65, abs=3 if "wide" in row else 1.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("average=50", "what is averaged must be kept"),
        ("model.preset=paper-bse", "did you mean 'paper-base'"),
        ("data.max_tokens=5000", "max_positions"),
        ("data.vocab=3", r"'data.vocab' \(did you mean 'vocabulary'\?\)"),
        ("label_smoothing=1.5", "less than 1"),
    ],
)
def test_what_does_not_fit_is_said(override, message):
    with pytest.raises(RequestError, match=message):
        load(RECIPES / "reverse.yaml", override)


def test_noam_is_equation_3():
    recipe = load(RECIPES / "wmt14-en-de-base.yaml")
    assert recipe.schedule == "noam"
    assert recipe.peak_learning_rate(512) == pytest.approx(512**-0.5 * 4000**-0.5)
