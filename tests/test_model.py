"""The public face, on the default real model and on tiny ones."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from architectures import ADMITTED
from comparing import FLAT_COST, prompt_of, untrained

import shoestring
from shoestring.decoding.tune import StepCost
from shoestring.engine.attention import ATTENTION_NAME
from shoestring.engine.sampling import SamplingOptions
from shoestring.errors import RequestError
from shoestring.generation import as_batch
from shoestring.model.templates import around_words

GENTLE = "The capital of France is"
MESSAGES = [{"role": "user", "content": "Name three colours."}]
STRATEGIES = [
    "autoregressive",
    "lookahead(window=4,ngram=4,guesses=4)",
    "lookahead(window=3,ngram=3,guesses=3,prompt_pool=true,keep_window=true)",
    "ngram",
    "auto(budget=8)",
    "pass(budget=12)",
    "pass(two_call=true,tokens=4)",
]


@pytest.fixture
def model(smollm2):
    if smollm2.look_ahead is None:
        smollm2.look_ahead = untrained(6, 576, 0.1)
    yield smollm2
    assert not smollm2.runner.slots, "a slot was left open"


@pytest.fixture(scope="module")
def tiny():
    model = shoestring.LanguageModel(ADMITTED["llama"].build(), name="tiny")
    model._step_cost = FLAT_COST
    return model


@pytest.fixture(scope="module")
def repetitive(smollm2):
    """A prompt whose answer repeats it, so that drafts are accepted."""
    return "Repeat: one two three four five six. one two three four five six. one two three four"


# What a prompt may be ----------------------------------------------------------------------------------------


def test_text_messages_and_token_ids_are_the_same_prompt(model):
    ids = model.tokenizer(GENTLE)["input_ids"]
    text = model.generate(GENTLE, decoding="autoregressive", max_new_tokens=6)
    assert "Paris" in text.text
    for prompt in (ids, tuple(ids), torch.tensor(ids)):
        assert model.generate(prompt, decoding="autoregressive", max_new_tokens=6).text == text.text
    chat = model.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert model.encode(MESSAGES) == model.encode(chat)


def test_a_list_of_prompts_gives_a_list(model):
    ids = model.encode(GENTLE)
    options = {"decoding": "autoregressive", "max_new_tokens": 3}
    alone = model.generate(GENTLE, **options)
    for batch in ([GENTLE], [ids], torch.tensor([ids]), [torch.tensor(ids)]):
        generations = model.generate(batch, **options)
        assert [generation.token_ids for generation in generations] == [alone.token_ids]
    mixed = model.generate([GENTLE, MESSAGES], **options)
    assert [g.prompt_tokens for g in mixed] == [len(ids), len(model.encode(MESSAGES))]


def test_as_batch_tells_one_prompt_from_several():
    assert as_batch("text") == (["text"], True)
    assert as_batch(["a", "b"]) == (["a", "b"], False)
    assert as_batch([1, 2]) == ([[1, 2]], True)
    assert as_batch([[1], [2, 3]]) == ([[1], [2, 3]], False)
    assert as_batch(MESSAGES) == ([MESSAGES], True)
    assert as_batch([MESSAGES, MESSAGES]) == ([MESSAGES, MESSAGES], False)
    assert as_batch(torch.tensor([[1, 2], [3, 4]])) == ([[1, 2], [3, 4]], False)
    assert as_batch(list(torch.tensor([1, 2]))) == ([[1, 2]], True)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([[]], "the prompt is empty"),
        (["fine", ""], "the prompt is empty"),
        (None, "the prompt is a NoneType"),
        ({"role": "user", "content": "x"}, "the prompt is a dict"),
        ([49152], "token id 49152 is not in the model's vocabulary of 49152"),
        ([-1], "token id -1"),
        ([1] * 8192, "8192 tokens and the model's context 8192"),
        ([{"role": "user"}], "a message needs a role and content"),
        ([{"role": "user", "content": "x"}, "y"], "a message needs a role and content, and this is 'y'"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_impossible_prompts_are_refused(model, prompt, message):
    with pytest.raises(RequestError, match=message):
        model.generate(prompt, decoding="autoregressive")


def test_messages_need_a_chat_template_that_takes_them(model):
    other = copy.copy(model)
    other.tokenizer = copy.deepcopy(model.tokenizer)
    other.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="the chat template refuses these messages: roles must alternate"):
        other.encode(MESSAGES)
    other.tokenizer.chat_template = None
    with pytest.raises(RequestError, match="has no chat template; give the prompt as text"):
        other.encode(MESSAGES)


def test_a_model_without_a_tokenizer_takes_token_ids_only(tiny):
    generation = tiny.generate([5, 6, 7], max_new_tokens=4)
    assert (len(generation.token_ids), generation.text, generation.logprobs) == (4, "", None)
    for prompt in ("text", MESSAGES):
        with pytest.raises(RequestError, match="tiny has no tokenizer; give token ids"):
            tiny.generate(prompt)
    with pytest.raises(RequestError, match="stop strings need a tokenizer"):
        tiny.generate([5], stop="x")


# Options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 5}, r"unknown option 'max_tokens' \(did you mean 'max_new_tokens'\?\)"),
        ({"prompt": "x", "temprature": 1}, r"unknown option 'temprature' \(did you mean 'temperature'\?\)"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 0}, "top_p is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop": [""]}, "a stop string is empty"),
        ({"decoding": "lookahed"}, "did you mean 'lookahead'"),
    ],
    ids=str,
)
def test_options_that_cannot_be_meant_are_refused(tiny, options, message):
    options = {name: value for name, value in options.items() if name != "prompt"}
    with pytest.raises(RequestError, match=message):
        tiny.generate([5], **options)


def test_stop_strings_may_be_one_or_several(model):
    options = {"decoding": "autoregressive", "max_new_tokens": 30}
    text = "1, 2, 3, 4, 5,"
    assert "8" in model.generate(text, **options).text
    for stop in ("8", ["99", "8"], ("8",)):
        generation = model.generate(text, stop=stop, **options)
        assert generation.text == " 6, 7, "
        assert generation.finish_reason == "stop"


# What comes out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.8, "seed": 1},
        {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 2},
    ],
    ids=["greedy", "sampled", "filtered"],
)
def test_every_strategy_gives_the_same_tokens_for_the_same_seed(model, repetitive, sampling):
    prompts = [repetitive, MESSAGES]
    plain = model.generate(prompts, decoding="autoregressive", max_new_tokens=16, **sampling)
    for decoding in STRATEGIES[1:]:
        generations = model.generate(prompts, decoding=decoding, max_new_tokens=16, **sampling)
        for ours, theirs in zip(generations, plain, strict=True):
            assert ours.token_ids == theirs.token_ids, decoding
            assert ours.text == theirs.text
        if decoding == "ngram" and not sampling:
            assert generations[0].steps < plain[0].steps, (
                "the prompt repeats itself: some drafts must be right"
            )


def test_greedy_is_what_transformers_gives(model):
    ids = model.encode(GENTLE)
    with torch.no_grad():
        output = model.model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=12, do_sample=False
        )
    ours = model.generate(GENTLE, decoding=STRATEGIES[1], max_new_tokens=12)
    assert ours.token_ids == output[0, len(ids) :].tolist()


def test_a_generations_fields_agree(model, repetitive):
    result = model.generate(repetitive, decoding="ngram(tokens=4)", max_new_tokens=20, logprobs=True)
    assert result.decoding == "ngram(tokens=4)"
    assert result.prompt_tokens == len(model.encode(repetitive))
    assert len(result.token_ids) == len(result.logprobs) == 20
    assert result.finish_reason == "length"
    assert result.text == model.tokenizer.decode(result.token_ids)
    assert 1 <= result.steps < 20, "the prompt repeats itself: some drafts must be right"
    assert result.tokens_per_step == 20 / result.steps
    assert result.tokens_per_second == 20 / result.seconds > 0
    assert all(logprob <= 0 for logprob in result.logprobs)
    scored = model.score([*model.encode(repetitive), *result.token_ids])
    assert scored.logprobs[-20:] == pytest.approx(result.logprobs, abs=1e-3)


def test_an_end_of_text_token_ends_the_text_and_is_not_shown(model):
    assert model.eos_ids == [0, 2]
    result = model.generate(
        [{"role": "user", "content": "Answer with one word: what is the capital of France?"}],
        decoding="autoregressive",
        max_new_tokens=60,
    )
    assert result.finish_reason == "stop"
    assert result.token_ids[-1] in model.eos_ids
    assert "<|" not in result.text


def test_stream_pieces_joined_are_the_generated_text(model, repetitive):
    options = {"decoding": "ngram", "max_new_tokens": 20, "stop": ["never said"]}
    result = model.generate(repetitive, **options)
    pieces = list(model.stream(repetitive, **options))
    assert "".join(piece.text for piece in pieces) == result.text
    assert [piece.token_id for piece in pieces] == result.token_ids
    assert [piece.generation is None for piece in pieces] == [True] * 19 + [False]
    assert pieces[-1].generation.token_ids == result.token_ids
    assert pieces[-1].generation.finish_reason == "length"
    assert pieces[-1].step == result.steps - 1
    assert sum(not piece.drafted for piece in pieces) == result.steps
    assert {piece.index for piece in model.stream([GENTLE, "Hello"], max_new_tokens=2, decoding="ngram")} == {
        0,
        1,
    }


def test_a_stream_may_be_left_and_another_begun(model):
    options = {"decoding": "autoregressive", "max_new_tokens": 6}
    whole = model.generate(GENTLE, **options).token_ids
    stream = model.stream(GENTLE, **options)
    begun = [next(stream).token_id for _ in range(2)]
    assert model.generate(GENTLE, **options).token_ids == whole
    assert begun + [piece.token_id for piece in stream] == whole
    left = model.stream(GENTLE, **options)
    next(left)
    left.close()


def test_the_same_prompt_twice_gives_different_samples_that_repeat(tiny):
    prompt = prompt_of(12)
    options = {"temperature": 1.0, "seed": 9, "max_new_tokens": 10, "decoding": "ngram"}
    batch = tiny.generate([prompt, prompt, [4, 5], prompt], **options)
    samples = [tuple(generation.token_ids) for generation in batch]
    assert len(set(samples)) == 4
    assert [tuple(g.token_ids) for g in tiny.generate([prompt, prompt, [4, 5], prompt], **options)] == samples
    assert tuple(tiny.generate(prompt, **options).token_ids) == samples[0]
    assert tuple(tiny.generate([4, 5], **options).token_ids) == samples[2], (
        "its own first sample, wherever it stands"
    )


def test_more_prompts_than_slots_wait_their_turn():
    model = shoestring.LanguageModel(ADMITTED["llama"].build(), slots=2)
    prompts = [prompt_of(5 + index, seed=index) for index in range(5)]
    options = {"decoding": "ngram", "max_new_tokens": 5}
    assert [g.token_ids for g in model.generate(prompts, **options)] == [
        model.generate(prompt, **options).token_ids for prompt in prompts
    ]


def test_a_chat_turn_runs_only_what_is_new(model):
    first = model.generate(MESSAGES, decoding="autoregressive", max_new_tokens=12)
    answer = {"role": "assistant", "content": first.text}
    turn = model.encode([*MESSAGES, answer, {"role": "user", "content": "And three more."}])
    cached = model.runner.open(0, SamplingOptions(), turn)
    model.runner.release(0)
    assert cached >= first.prompt_tokens + 8, "the first turn must be taken from the cache"
    assert len(turn) - cached < len(turn) // 2


# Strategies --------------------------------------------------------------------------------------------------


class Parrot:
    """A user's own drafter: says the prompt again, as plain lists."""

    name = "parrot"

    def begin(self, prompt):
        self.prompt, self.steps = list(prompt), 0

    def propose(self, context, budget):
        at = (len(context.tokens) - context.prompt_length) % len(self.prompt)
        return [self.prompt[at : at + 3], self.prompt[:2]]

    def observe(self, step):
        self.steps += 1


def test_a_drafter_of_the_users_decodes(tiny):
    prompt = prompt_of(14)
    plain = tiny.generate(prompt, decoding="autoregressive", max_new_tokens=12)
    parrot = Parrot()
    result = tiny.generate(prompt, decoding=parrot, max_new_tokens=12)
    assert result.token_ids == plain.token_ids
    assert result.decoding == "parrot"
    assert parrot.prompt == prompt
    assert parrot.steps == result.steps - 1
    trace = [piece.trace for piece in tiny.stream(prompt, decoding=parrot, max_new_tokens=3) if piece.trace]
    assert trace
    assert all(set(counts) == {"parrot"} for counts in trace)
    with pytest.raises(RequestError, match="one drafter object cannot serve a batch"):
        tiny.generate([prompt, prompt], decoding=parrot)


def test_auto_says_when_it_decodes_plainly():
    model = shoestring.LanguageModel(ADMITTED["llama"].build())
    model._step_cost = StepCost((1, 2, 4, 128), (1.0, 2.0, 4.0, 128.0))
    assert "auto decodes plainly here" in model.generate([5, 6], max_new_tokens=2).note
    model._step_cost = FLAT_COST
    assert model.generate([5, 6], max_new_tokens=2).note is None


def test_the_step_cost_is_measured_once_and_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path))
    hf_model = ADMITTED["llama"].build()
    cost = shoestring.LanguageModel(hf_model).step_cost()
    (file,) = (tmp_path / "step-cost").iterdir()
    stored = json.loads(file.read_text())
    assert stored["rows"] == list(cost.rows)
    file.write_text(json.dumps({**stored, "seconds": [1.0] * len(cost.rows)}))
    assert shoestring.LanguageModel(hf_model).step_cost().seconds == (1.0,) * len(cost.rows)
    shoestring.LanguageModel(ADMITTED["llama"].build(num_hidden_layers=1)).step_cost()
    assert len(list((tmp_path / "step-cost").iterdir())) == 2, "another model is measured for itself"


def test_its_own_texts_are_written_once_and_remembered(tmp_path, monkeypatch):
    from shoestring.model import language_model

    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path))
    written = []

    def write(runner, opening, ending, eos_ids, seconds, progress):
        written.append((opening, ending, seconds))
        return np.arange(len(written) * 10, dtype=np.int32)

    monkeypatch.setattr(language_model, "write_texts", write)
    hf_model = ADMITTED["llama"].build()
    model = shoestring.LanguageModel(hf_model, name="tiny")
    assert len(model.datastore()) == 10
    assert model.datastore() is model.datastore()
    assert len(shoestring.LanguageModel(hf_model).datastore()) == 10
    assert written == [([0], None, None)], "no chat format, no tokenizer"
    assert len(model.datastore(seconds=3.0)) == 20
    assert written[1:] == [([0], None, 3.0)]
    other = copy.deepcopy(hf_model)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    assert len(shoestring.LanguageModel(other).datastore()) == 30, "other weights say other things"
    slow = shoestring.LanguageModel(other)
    slow._successors = np.empty((0, 8), np.int32)
    assert slow.datastore() is None, "too slow to look at its vocabulary"
    assert len(written) == 3
    monkeypatch.setattr(language_model, "write_texts", lambda *arguments, **options: np.empty(0, np.int32))
    assert shoestring.LanguageModel(other).datastore(seconds=1.0) is None


def test_a_bundled_models_texts_come_with_it_and_its_chat_format_is_known(smollm2):
    chat = smollm2.encode(MESSAGES)
    opening, ending = smollm2.chat_frame()
    assert chat[: len(opening)] == opening
    assert chat[len(chat) - len(ending) :] == ending
    assert smollm2.tokenizer.decode(chat[len(opening) : len(chat) - len(ending)]) == MESSAGES[0]["content"]
    assert len(smollm2.datastore()) >= 100_000


@pytest.mark.parametrize(
    "template",
    [None, "{{ raise_exception('no') }}", "{{ messages[0]['content'] }}", "a{{ messages[0]['content'] }}"],
)
def test_a_format_with_nothing_on_both_sides_of_the_words_is_none(smollm2, template):
    tokenizer = copy.deepcopy(smollm2.tokenizer)
    tokenizer.chat_template = template
    assert around_words(tokenizer) is None


@pytest.fixture(scope="module")
def folders(tmp_path_factory, smollm2):
    """A tiny model with the real tokenizer, and one with a token more."""
    size = len(smollm2.tokenizer)
    root = tmp_path_factory.mktemp("models")
    for name in ("small", "stranger"):
        tokenizer = copy.deepcopy(smollm2.tokenizer)
        if name == "stranger":
            tokenizer.add_tokens(["<another>"])
        ADMITTED["llama"].build(vocab_size=size + (name == "stranger")).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def test_a_draft_model_drafts_and_is_loaded_once(folders):
    model = shoestring.load(str(folders / "small"), device="cpu", dtype="float32")
    plain = model.generate("Once upon a time", decoding="autoregressive", max_new_tokens=12)
    drafting = f"draft_model(model='{folders / 'small'}',tokens=3)"
    for _ in range(2):
        result = model.generate("Once upon a time", decoding=drafting, max_new_tokens=12)
        assert result.token_ids == plain.token_ids
        assert result.steps == 3, "a model agrees with itself"
    assert len(model._draft_runners) == 1
    model.close()


def test_a_draft_model_with_another_tokenizer_is_refused(folders):
    model = shoestring.load(str(folders / "small"), device="cpu", dtype="float32")
    with pytest.raises(RequestError, match=r"stranger' has another tokenizer than .*both must share one"):
        model.generate("Hello", decoding=shoestring.DraftModel(str(folders / "stranger")))
    model.close()


# Scoring -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["Paris is the capital of France.", "naïve 日本語 🙂\n\n\tx  y " * 16], ids=["short", "long"]
)
def test_a_score_is_transformers_own_log_probability(model, text):
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logprobs = model.model(ids).logits[0, :-1].log_softmax(-1)
    expected = logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist()
    score = model.score(text)
    assert score.token_ids == ids[0].tolist()
    assert score.logprobs == pytest.approx(expected, abs=2e-3)
    assert score.mean_logprob == pytest.approx(sum(expected) / len(expected), abs=1e-3)
    assert score.perplexity == pytest.approx(math.exp(-score.mean_logprob))
    assert model.score(ids[0]) == score


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ([5], "at least two tokens; this text has 1"),
        ([5] * 513, "513 tokens and the model's context 512"),
        ([5, 199], "token id 199"),
        ([[5, 6], [7, 8]], "one text at a time"),
    ],
    ids=["short", "long", "unknown", "several"],
)
def test_what_cannot_be_scored_is_refused(tiny, text, message):
    with pytest.raises(RequestError, match=message):
        tiny.score(text)
    assert len(tiny.score([5] * 512).logprobs) == 511


def test_closing_gives_the_hf_model_its_attention_back():
    hf_model = ADMITTED["llama"].build()
    before = hf_model.config._attn_implementation
    model = shoestring.LanguageModel(hf_model)
    assert hf_model.config._attn_implementation == ATTENTION_NAME
    model.close()
    assert hf_model.config._attn_implementation == before
    with pytest.raises(RequestError, match="was closed"):
        model.generate([5], decoding="autoregressive")
