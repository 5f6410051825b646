from typing import Annotated

import pytest
from pydantic import Field

from shoestring.errors import RequestError
from shoestring.training.recipe import Recipe, Section, read_recipe, task_of, validated


class Model(Section):
    layers: Annotated[int, Field(ge=1)] = 2
    dropout: float = 0.1


class Mine(Recipe):
    model: Model = Model()


MINIMAL = {"task": "mine", "steps": 10, "learning_rate": 0.1}


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("# shoestring train mine.yaml\ntask: mine\nsteps: 10\nlearning_rate: 1e-3\n")
    return path


def test_overrides_are_yaml_and_reach_into_sections(recipe):
    values = read_recipe(recipe, ["steps=20", "model.layers=3", "betas=[0.8, 0.9]", "device=cpu"])
    mine = validated(Mine, values)
    assert (mine.steps, mine.model.layers, mine.model.dropout) == (20, 3, 0.1)
    assert (mine.betas, mine.learning_rate) == ((0.8, 0.9), 1e-3)
    assert task_of(values) == "mine"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stepz": 3}, ["'stepz'", "did you mean 'steps'"]),
        ({"model": {"layer": 3}}, ["'model.layer'", "did you mean 'layers'", "dropout"]),
        ({"steps": 0}, ["steps = 0", "greater than or equal to 1"]),
        ({"model": {"layers": "many"}}, ["model.layers = 'many'", "integer"]),
        ({"schedule": "noem"}, ["schedule = 'noem'", "noam"]),
    ],
)
def test_what_is_wrong_is_named(values, words):
    with pytest.raises(RequestError) as caught:
        validated(Mine, MINIMAL | values)
    assert all(word in str(caught.value) for word in words), caught.value


def test_missing_key():
    with pytest.raises(RequestError, match="no 'steps'"):
        validated(Mine, {"task": "mine", "learning_rate": 1})


@pytest.mark.parametrize("override", ["steps", "=3", "steps.more=3", "steps=[1"])
def test_bad_overrides(recipe, override):
    with pytest.raises(RequestError, match=r"steps|=3"):
        read_recipe(recipe, [override])


@pytest.mark.parametrize(
    ("content", "message"), [("- a\n", "not a recipe"), ("a: [", "not YAML"), ("", "not a")]
)
def test_bad_files(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(RequestError, match=message):
        read_recipe(path)
    with pytest.raises(RequestError, match="cannot be read"):
        read_recipe(tmp_path / "absent.yaml")


def test_no_task():
    with pytest.raises(RequestError, match="task: transformer"):
        task_of({})
