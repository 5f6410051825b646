"""The governor rests drafts that lose by the clock, and lets those go on that win."""

import random

import pytest

from shoestring.decoding.governor import Governor


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def run(steps, plain, drafting, accepted, sequences=1, chance=None, **options):
    """Which steps drafted: a plain one takes `plain` seconds, a drafting one `drafting` and emits `accepted(step)`."""
    clock = Clock()
    governor = Governor(clock=clock, **options)
    drafted = []
    for step in range(steps):
        verdicts = {governor.drafts() for _ in range(sequences)}
        assert len(verdicts) == 1, "sequences of one step must agree"
        drafts = verdicts.pop()
        drafted.append(drafts)
        noise = chance.uniform(0.8, 1.2) if chance else 1.0
        clock.now += noise * (drafting if drafts else plain)
        for _ in range(sequences):
            governor.ends(accepted(step) if drafts else 1)
        clock.now += 5.0  # the consumer's time between steps is not a step's
    return drafted


def test_winning_drafts_go_on_but_for_a_look_at_the_plain_step():
    drafted = run(400, plain=1.0, drafting=1.4, accepted=lambda step: 2)
    assert drafted[:2] == [False, False]
    assert sum(drafted) >= 400 - 2 - 400 // 64 - 1
    assert not all(drafted[2:])


def test_losing_drafts_rest_longer_and_longer():
    drafted = run(600, plain=1.0, drafting=1.5, accepted=lambda step: 1)
    assert sum(drafted[:40]) == 8 + 4
    # 8 + 4 a rest of 16, 32, 64, 128, 128, ...: little is lost in the long run.
    assert sum(drafted) <= 8 + 4 * 6
    assert any(drafted[-140:]), "tried again some time"


@pytest.mark.parametrize("seed", range(5))
def test_loss_is_small_on_a_noisy_machine(seed):
    chance = random.Random(seed)
    drafted = run(500, plain=1.0, drafting=1.3, accepted=lambda step: 1, chance=chance)
    seconds = sum(1.3 if drafts else 1.0 for drafts in drafted)
    assert 500 / seconds > 0.97


def test_text_that_begins_to_repeat_is_noticed():
    drafted = run(600, plain=1.0, drafting=1.5, accepted=lambda step: 1 if step < 200 else 4)
    assert sum(drafted[200:340]) >= 10
    assert sum(drafted[345:400]) >= 54  # but for a look at the plain step


def test_sequences_share_the_verdict():
    drafted = run(100, plain=2.0, drafting=5.0, accepted=lambda step: 2, sequences=4)
    assert sum(drafted) < 40


def test_a_step_that_reads_a_prompt_does_not_count():
    clock = Clock()
    governor = Governor(clock=clock)
    for step in range(60):
        drafts = governor.drafts()
        # Prompts are read in steps 2, 5, 8, ...: slow ones, which would make plain steps look dear.
        prompt = step % 3 == 2
        clock.now += 50.0 if prompt else 1.5 if drafts else 1.0
        governor.ends(1, counts=not prompt)
    assert not governor.drafts()
