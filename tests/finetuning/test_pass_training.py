"""Look-ahead embeddings on tiny models: what is trained, what is not, and that training pays."""

import json
import random

import pytest
import torch
from architectures import ADMITTED
from comparing import generate, plain_model, prompt_of
from folders import write_llama
from transformers import AutoTokenizer, LlamaForCausalLM

import shoestring
from shoestring.cli import run
from shoestring.decoding.look_ahead import FILE_NAME, read_look_ahead
from shoestring.errors import RequestError, UnsupportedModelError
from shoestring.finetuning.own_answers import generate_answers
from shoestring.finetuning.pass_acceptance import measure_acceptance
from shoestring.finetuning.pass_model import (
    Example,
    LookAheadModel,
    collate,
    initial_embeddings,
    weights_hash,
)
from shoestring.finetuning.pass_recipe import PassRecipe
from shoestring.finetuning.pass_train import train_pass
from shoestring.training.folder import RunFolder
from shoestring.training.recipe import validated

SENTENCES = ["the cat sat on the mat.", "a dog ran in the park.", "birds sang in a green tree."]
WORDS = " ".join(SENTENCES).split()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny model that has learnt a few sentences by heart, so that its next tokens can be foreseen."""
    folder = write_llama(tmp_path_factory.mktemp("models") / "tiny", chat=True)
    model = LlamaForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chance = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(250):
        lines = [" ".join(chance.choices(SENTENCES, k=4))[:80] for _ in range(8)]
        ids = torch.tensor([tokenizer(line)["input_ids"][:72] for line in lines])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    chance = random.Random(1)
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    lines = [{"text": " ".join(chance.choices(SENTENCES, k=4))} for _ in range(60)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def recipe_of(tiny, texts, **changes):
    values = {
        "task": "pass",
        "model": str(tiny),
        "device": "cpu",
        "precision": "fp32",
        "tokens": 3,
        "steps": 12,
        "learning_rate": 0.05,
        "log_every": 4,
        "evaluate_every": 6,
        "save_every": 4,
        "data": {
            "texts": [{"path": str(texts)}],
            "held_out": 8,
            "max_tokens": 48,
            "batch_size": 4,
            "insertions": 6,
        },
    }
    return validated(PassRecipe, {**values, **changes})


ARCHITECTURES = ["llama", "gemma2", "mistral", "gpt2", "qwen3", "gpt_oss"]


@pytest.mark.parametrize(
    "name", [name for name in ARCHITECTURES if name in ADMITTED and ADMITTED[name].exists]
)
def test_rows_of_all_insertions_are_those_of_plain_passes(name):
    base, plain = ADMITTED[name].build(), plain_model(name)
    tokens = 3
    model = LookAheadModel(base, torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1)) * 0.5)
    batch = torch.tensor([prompt_of(30, seed=1), prompt_of(30, seed=2)])
    points = torch.tensor([0, 7, 8, 21, 27])
    drafts, teacher = model.predictions(batch, points)
    embed = plain.get_input_embeddings()
    for row, text in enumerate(batch):
        with torch.no_grad():
            own = plain(text[None], use_cache=False).logits[0]
        for column, point in enumerate(points.tolist()):
            with torch.no_grad():
                inputs = torch.cat([embed(text[: point + 1]), model.look_ahead])
                expected = plain(inputs_embeds=inputs[None], use_cache=False).logits[0, point + 1 :]
            torch.testing.assert_close(drafts[row, column], expected, atol=2e-4, rtol=2e-4)
            for place in range(tokens):
                if point + 1 + place < 30:
                    torch.testing.assert_close(
                        teacher[row, column, place], own[point + 1 + place], atol=2e-4, rtol=2e-4
                    )
    model.close()


def test_a_batch_says_what_counts():
    examples = [Example(range(10, 20), 3), Example(range(30, 36))]
    batch = collate(examples, 3, 100, random.Random(0))
    assert batch["input_ids"].tolist() == [list(range(10, 20)), [*range(30, 36), 0, 0, 0, 0]]
    points = batch["points"].tolist()
    assert points == list(range(8))
    labels = batch["labels"]
    assert (labels[0, :3] == -100).all(), "a prompt's tokens are not trained on"
    assert labels[0, 3].tolist() == [15, 16, 17]
    assert labels[0, 7].tolist() == [19, -100, -100]
    assert labels[1, 0].tolist() == [32, 33, 34]
    assert (labels[1, 5:] == -100).all()


@pytest.mark.parametrize("loss", ["kl", "cross_entropy"])
def test_losses_count_by_position(loss):
    model = LookAheadModel(ADMITTED["llama"].build(), torch.zeros(2, 64) + 0.1, loss, decay=0.5)
    batch = collate([Example(prompt_of(24))], 2, 5, random.Random(0))
    drafts, teacher = model.predictions(batch["input_ids"], batch["points"])
    expected = 0.0
    for column in range(len(batch["points"])):
        for place in range(2):
            label = int(batch["labels"][0, column, place])
            if label < 0:
                continue
            log_q = drafts[0, column, place].log_softmax(-1)
            log_p = teacher[0, column, place].log_softmax(-1)
            one = -log_q[label] if loss == "cross_entropy" else (log_p.exp() * (log_p - log_q)).sum()
            expected += 0.5**place * one.item()
    found = model(**batch, num_items_in_batch=7)["loss"]
    assert found.item() == pytest.approx(expected / 7, rel=1e-4)
    found.backward()
    assert model.look_ahead.grad.abs().sum() > 0
    assert [name for name, _ in model.named_parameters()] == ["look_ahead"]
    model.close()


def test_training_learns_changes_nothing_else_and_resumes(tiny, texts, tmp_path):
    recipe = recipe_of(tiny, texts, steps=80, save_every=20)
    folder = RunFolder.open(tmp_path / "run", recipe)
    result = train_pass(recipe, folder)
    losses = [row["loss"] for row in folder.metrics("train")]
    assert losses[-1] < 0.5 * losses[0]
    assert result["trained"]["match_by_position"][0] > result["untrained"]["match_by_position"][0] + 0.1
    assert result["base_unchanged"]
    assert result["parameters"] == 3 * 64
    assert (tmp_path / "run" / "plots" / "acceptance_by_position.png").is_file()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["tokens"] == 3

    def stop(progress):
        if progress.kind == "train" and progress.step >= 24:
            raise KeyboardInterrupt

    again = RunFolder.open(tmp_path / "again", recipe)
    with pytest.raises(KeyboardInterrupt):
        train_pass(recipe, again, stop)
    assert again.last_checkpoint()
    train_pass(recipe, RunFolder.open(tmp_path / "again", recipe, resume=True))
    straight, resumed = (read_look_ahead(tmp_path / name) for name in ("run", "again"))
    assert torch.equal(straight.embeddings, resumed.embeddings)
    assert straight.manifest["results"]["acceptance"] == result["acceptance"]

    model = shoestring.load(
        str(tiny), look_ahead=str(tmp_path / "run" / FILE_NAME), device="cpu", dtype="float32"
    )
    plain = model.generate("the cat", decoding="autoregressive", max_new_tokens=60)
    for decoding, least in (
        ("pass(budget=16)", 1.2),
        ("pass(two_call=true)", 1.02),
        ("auto(budget=16)", 1.2),
    ):
        generation = model.generate("the cat", decoding=decoding, max_new_tokens=60)
        assert generation.token_ids == plain.token_ids
        assert generation.tokens_per_step > least


def test_only_whole_chains_are_measured(tiny):
    base = LlamaForCausalLM.from_pretrained(tiny)
    model = LookAheadModel(base, initial_embeddings(base, 4, "random"))
    acceptance = measure_acceptance(model, [Example(range(10, 30), 9), Example(range(20, 26))], 2, 50)
    assert acceptance.insertions == (20 - 1 - 4 - 9 - 1 + 1) + 1
    assert all(0 <= rate <= 1 for rates in acceptance.conditional for rate in rates)
    assert acceptance.summary()["tree_tokens_per_step"] >= acceptance.summary()["chain_tokens_per_step"] >= 1
    model.close()


def test_the_models_own_answers_are_written_once(tiny, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in WORDS))
    data = {"prompts": [{"path": str(prompts)}], "held_out": 4, "max_tokens": 64, "batch_size": 4}
    recipe = recipe_of(tiny, prompts, steps=2, data=data, answers={"max_new_tokens": 20, "batch_size": 6})
    folder = RunFolder.open(tmp_path / "run", recipe)
    seen = []
    result = train_pass(recipe, folder, lambda progress: seen.append(progress.kind))
    assert "answers" in seen
    lines = (tmp_path / "run" / "answers.jsonl").read_text().splitlines()
    assert len(lines) == len(WORDS)
    assert result["held_out_texts"] <= 4


def test_answers_are_those_of_one_prompt_at_a_time():
    model = plain_model("llama")
    prompts = [prompt_of(length, seed=length) for length in (9, 3, 14)]
    answers = generate_answers(model, prompts, max_new_tokens=8, batch_size=2)
    assert answers == [generate(model, prompt, 8) for prompt in prompts]
    end = answers[0][4]
    cut = generate_answers(model, prompts[:1], max_new_tokens=8, eos_ids=[end])[0]
    assert cut == answers[0][: answers[0].index(end)]
    one, two = (
        generate_answers(model, prompts, max_new_tokens=8, temperature=1.0, seed=seed) for seed in (1, 2)
    )
    assert one != two
    assert one == generate_answers(model, prompts, max_new_tokens=8, temperature=1.0, seed=1)
    with pytest.raises(RequestError, match="14 tokens and 600 new ones are more than the model's context"):
        generate_answers(model, prompts, max_new_tokens=600)


def test_weights_hash_sees_a_single_bit():
    model = ADMITTED["llama"].build()
    before = weights_hash(model)
    assert before == weights_hash(ADMITTED["llama"].build())
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-6
    assert weights_hash(model) != before


@pytest.mark.parametrize("how", ["mean", "tokens", "random"])
def test_initial_embeddings(how):
    model = plain_model("llama")
    found = initial_embeddings(model, 4, how, seed=3)
    assert found.shape == (4, 64)
    assert torch.equal(found, initial_embeddings(model, 4, how, seed=3))
    weight = model.get_input_embeddings().weight
    if how == "tokens":
        assert all((weight == row).all(-1).any() for row in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens = 0"),
        ({"loss": "mse"}, "loss = 'mse'"),
        ({"decay": 0}, "decay = 0"),
        ({"tokns": 3}, r"unknown key 'tokns' \(did you mean 'tokens'"),
        ({"data": {}}, "neither texts nor prompts"),
        ({"data": {"texts": [{"path": "nowhere.txt"}]}}, r"no file 'nowhere\.txt'"),
        ({"tokens": 60}, "60 look-ahead tokens need 62 tokens, the longest"),
    ],
)
def test_bad_recipes_are_one_line(tiny, texts, tmp_path, monkeypatch, changes, message):
    monkeypatch.setenv("SHOESTRING_DATA", str(tmp_path))

    def attempt():
        recipe = recipe_of(tiny, texts, **changes)
        train_pass(recipe, RunFolder.open(tmp_path / "run", recipe))

    with pytest.raises(RequestError, match=message):
        attempt()


@pytest.mark.skipif(not ADMITTED["gemma3n"].exists, reason="no Gemma 3n in this version of transformers")
def test_a_model_whose_layers_look_up_token_ids_is_refused():
    with pytest.raises(UnsupportedModelError, match="gemma3n_text: its layers look up token ids"):
        LookAheadModel(ADMITTED["gemma3n"].build(), torch.zeros(2, 64))


def test_the_command_trains_by_the_shipped_recipes_schema(tiny, texts, tmp_path, capfd):
    recipe = tmp_path / "pass.yaml"
    recipe.write_text(
        f"task: pass\nmodel: {tiny}\ndevice: cpu\ntokens: 2\nsteps: 3\nlearning_rate: 0.01\n"
        f"data:\n  texts: [{{path: {texts}}}]\n  held_out: 4\n  max_tokens: 32\n"
    )
    assert run(["train", str(recipe), "steps=2", "--output", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["tokens"] == 2
    assert read_look_ahead(tmp_path / "run").embeddings.shape == (2, 64)
