"""`model.generate(..., custom_generate=shoestring.custom_generate)` against `model.generate(...)` itself."""

import pytest
import torch
from architectures import ADMITTED
from comparing import assert_plain, plain_model, prompt_of
from transformers import (
    AutoModelForCausalLM,
    LogitsProcessorList,
    MaxLengthCriteria,
    NoRepeatNGramLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

import shoestring
from shoestring import custom_generate
from shoestring.engine.sampling import SamplingOptions
from shoestring.errors import RequestError, UnsupportedModelError

LOOKAHEAD = "lookahead(window=4,ngram=4,guesses=4)"
PROMPT = prompt_of(13)
LONG = prompt_of(18, seed=3)


@pytest.fixture(scope="module")
def llama():
    return ADMITTED["llama"].build()


@pytest.fixture(autouse=True)
def _attention_is_given_back(llama):
    before = llama.config._attn_implementation
    yield
    assert llama.config._attn_implementation == before


@pytest.fixture(scope="module")
def padded():
    """Two prompts, the first left-padded."""
    ids = torch.tensor([[0] * 5 + PROMPT, LONG])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


def inputs(prompt):
    ids = torch.tensor([prompt])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def both(model, arguments, decoding=LOOKAHEAD, **options):
    """Transformers' own output and ours."""
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 14, **options}
    theirs = model.generate(**arguments, **options)
    ours = model.generate(**arguments, **options, custom_generate=custom_generate, decoding=decoding)
    return theirs, ours


@pytest.mark.parametrize("decoding", ["autoregressive", LOOKAHEAD, "ngram", "auto(budget=6)"])
def test_greedy_tokens_are_those_of_generate(llama, decoding):
    theirs, ours = both(llama, inputs(PROMPT), decoding)
    assert torch.equal(ours, theirs)
    assert ours.shape == (1, len(PROMPT) + 14)


def test_so_they_are_on_the_real_model(smollm2):
    # A second module, as ours is on tree attention already; the weights are the same.
    model = AutoModelForCausalLM.from_pretrained(
        smollm2.model.config._name_or_path, dtype=torch.float32
    ).eval()
    text = "Repeat: one two three four five six. one two three four five six. one two three"
    encoded = smollm2.tokenizer(text, return_tensors="pt")
    theirs, ours = both(model, encoded, "ngram", max_new_tokens=12)
    assert torch.equal(ours, theirs)
    stop = StoppingCriteriaList([StopStringCriteria(smollm2.tokenizer, ["e six"])])
    theirs, ours = both(model, encoded, "ngram", max_new_tokens=12, stopping_criteria=stop)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] < encoded["input_ids"].shape[1] + 12


def test_without_a_mask_nothing_is_padding(llama):
    ids = torch.tensor([PROMPT])
    ours = llama.generate(
        ids, max_new_tokens=5, do_sample=False, custom_generate=custom_generate, decoding="ngram"
    )
    assert torch.equal(ours, both(llama, inputs(PROMPT), max_new_tokens=5)[0])


def test_a_left_padded_batch(llama, padded):
    theirs, ours = both(llama, padded)
    assert torch.equal(ours, theirs)


def test_any_eos_id_ends_a_row_and_the_others_go_on(llama, padded):
    whole = both(llama, padded)[0][:, 18:]
    ends = [int(whole[0, 3]), int(whole[1, 9])]
    theirs, ours = both(llama, padded, eos_token_id=ends)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] <= 18 + 10
    assert (ours[0, 18 + 4 :] == 0).all()


def test_repetition_penalty_is_obeyed(llama):
    theirs, ours = both(llama, inputs(PROMPT), repetition_penalty=0.5)
    assert torch.equal(ours, theirs)
    assert not torch.equal(theirs, both(llama, inputs(PROMPT))[0])


def test_max_length_counts_the_prompt_and_a_criterion_of_the_users_counts_first(llama):
    theirs, ours = both(llama, inputs(PROMPT), max_new_tokens=None, max_length=len(PROMPT) + 6)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] == len(PROMPT) + 6
    criteria = StoppingCriteriaList([MaxLengthCriteria(max_length=len(PROMPT) + 4)])
    ours = llama.generate(
        **inputs(PROMPT),
        max_new_tokens=14,
        do_sample=False,
        stopping_criteria=criteria,
        custom_generate=custom_generate,
        decoding="ngram",
    )
    assert torch.equal(ours, theirs[:, : len(PROMPT) + 4])


class MultipleOfFour(StoppingCriteria):
    """Ends a row whose tokens since the prompt add up to a multiple of 4."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, len(LONG) :].sum(dim=1) % 4 == 0


def test_criteria_of_the_users_see_each_row_as_it_grows(llama, padded):
    # Transformers pads ended rows only where some token could end them.
    theirs, ours = both(
        llama, padded, stopping_criteria=StoppingCriteriaList([MultipleOfFour()]), eos_token_id=1
    )
    assert torch.equal(ours, theirs)
    assert ours.shape[1] < len(LONG) + 14


def test_return_dict_in_generate(llama):
    theirs, ours = both(llama, inputs(PROMPT), return_dict_in_generate=True)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert type(ours) is type(theirs)


def sample(llama, torch_seed, **options):
    torch.manual_seed(torch_seed)
    options = {
        "do_sample": True,
        "temperature": 0.9,
        "top_k": 0,
        "max_new_tokens": 12,
        "pad_token_id": 0,
        **options,
    }
    return llama.generate(**inputs(PROMPT), **options, custom_generate=custom_generate, decoding="ngram")


def test_samples_repeat_with_torchs_seed_and_differ_otherwise(llama):
    assert torch.equal(sample(llama, 1), sample(llama, 1))
    assert not torch.equal(sample(llama, 1), sample(llama, 2))


def test_num_return_sequences_are_different_samples(llama):
    rows = sample(llama, 1, num_return_sequences=4)
    assert rows.shape == (4, len(PROMPT) + 12)
    assert len({tuple(row) for row in rows.tolist()}) == 4
    assert torch.equal(rows[:1], sample(llama, 1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 5, "temperature": 0.7},
        {"top_p": 0.6},
        {"min_p": 0.2, "repetition_penalty": 1.4},
    ],
    ids=str,
)
def test_sampling_settings_are_obeyed(llama, options):
    tokens = sample(llama, 3, **options)[0, len(PROMPT) :].tolist()
    torch.manual_seed(3)
    sampling = SamplingOptions(**{"temperature": 0.9, "seed": int(torch.randint(1 << 62, ())), **options})
    assert_plain(plain_model("llama"), PROMPT, tokens, sampling)


def test_processors_of_the_users_are_obeyed(llama):
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.5), TopKLogitsWarper(3)])
    tokens = sample(llama, 3, temperature=1.0, logits_processor=processors)[0, len(PROMPT) :].tolist()
    torch.manual_seed(3)
    sampling = SamplingOptions(temperature=0.5, top_k=3, seed=int(torch.randint(1 << 62, ())))
    assert_plain(plain_model("llama"), PROMPT, tokens, sampling)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor is not supported"),
        ({"logits_processor": LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])}, "NoRepeatNGramLogits"),
        ({"num_beams": 2}, "num_beams=2 is not supported"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores is not supported"),
        ({"decoding": "lookahed"}, "did you mean 'lookahead'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_honoured_is_refused(llama, options, message):
    with pytest.raises(RequestError, match=message):
        llama.generate(
            **inputs(PROMPT), max_new_tokens=4, do_sample=False, custom_generate=custom_generate, **options
        )


def test_a_mask_of_another_shape_is_refused(llama):
    ids = torch.tensor([PROMPT])
    mask = torch.ones(1, 1, len(PROMPT), len(PROMPT))
    with pytest.raises(RequestError, match=r"the attention mask is \[1, 1, 13, 13\]"):
        custom_generate(
            llama, ids, generation_config=llama.generation_config, attention_mask=mask, decoding="ngram"
        )


def test_it_is_called_through_generate(llama):
    with pytest.raises(RequestError, match="call it through generate"):
        custom_generate(llama, torch.tensor([PROMPT]))


class Failing:
    name = "failing"

    def begin(self, prompt):
        pass

    def propose(self, context, budget):
        raise KeyError("a drafter's own bug")

    def observe(self, step):
        pass


def test_after_an_exception_the_model_is_as_it_was(llama):
    before = llama.config._attn_implementation
    with pytest.raises(KeyError, match="own bug"):
        both(llama, inputs(PROMPT), Failing())
    assert llama.config._attn_implementation == before
    theirs, ours = both(llama, inputs(PROMPT))
    assert torch.equal(ours, theirs)


def test_one_drafter_object_cannot_serve_a_batch(llama, padded):
    with pytest.raises(RequestError, match="one drafter object cannot serve a batch"):
        both(llama, padded, Failing())


def test_a_model_that_the_engine_refuses_says_so():
    from architectures import REFUSED

    with pytest.raises(UnsupportedModelError, match="bloom models"):
        both(REFUSED["bloom"].build(), inputs([5, 6, 7]))


def test_it_works_on_a_model_that_a_language_model_holds(llama):
    expected = both(llama, inputs(PROMPT))[0]
    held = shoestring.LanguageModel(llama)
    try:
        assert torch.equal(both(llama, inputs(PROMPT))[1], expected)
        tokens = held.generate(PROMPT, decoding="ngram", max_new_tokens=14).token_ids
        assert tokens == expected[0, len(PROMPT) :].tolist()
    finally:
        held.close()
