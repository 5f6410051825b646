"""The governor rests drafts that lose by the clock, and lets those go on that win."""

import random

import pytest

from shoestring.decoding.governor import Governor
from shoestring.decoding.tune import StepCost


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
        drafts = governor.drafts(sequences)
        drafted.append(drafts)
        noise = chance.uniform(0.8, 1.2) if chance else 1.0
        clock.now += noise * (drafting if drafts else plain)
        governor.ends(sequences * (accepted(step) if drafts else 1), told=sequences)
        clock.now += 5.0  # the consumer's time between steps is not a step's
    return drafted


def test_winning_drafts_go_on_but_for_a_look_at_the_plain_step():
    drafted = run(400, plain=1.0, drafting=1.4, accepted=lambda step: 2)
    assert drafted[:4] == [False] * 4
    assert sum(drafted) >= 400 - 4 - 400 // 32 - 1
    assert not all(drafted[4:])


def test_losing_drafts_rest_longer_and_longer():
    drafted = run(2000, plain=1.0, drafting=1.5, accepted=lambda step: 1)
    assert sum(drafted[:100]) == 13, "until more than six plain steps' time is lost"
    lengths = [len(rest) for rest in "".join("d" if one else "." for one in drafted[4:]).split("d") if rest]
    assert lengths[0] >= 240, "what was lost is a fortieth of so many"
    assert lengths[1] == 2 * lengths[0]


def test_drafts_of_more_than_four_rest_longer_for_what_they_lose():
    first = {}
    for sequences in (4, 8, 16):
        drafted = run(3000, plain=1.0, drafting=3.0, accepted=lambda step: 1, sequences=sequences)
        rests = "".join("d" if one else "." for one in drafted[4:]).split("d")
        first[sequences] = next(len(rest) for rest in rests if rest)
    assert first[4] >= 2.0 / 0.025, "two plain steps are lost by one drafting step"
    assert first[8] == pytest.approx(2 * first[4], rel=0.1)
    assert first[16] == pytest.approx(4 * first[4], rel=0.2)


def test_less_may_be_lost_of_what_does_not_promise_to_pay():
    drafted = run(1000, plain=1.0, drafting=1.5, accepted=lambda step: 1, limit=2.0, allowance=0.01)
    assert sum(drafted) * 0.5 <= 0.02 * 1000
    assert sum(drafted[:20]) == 5


def test_a_batch_whose_texts_end_one_after_another_does_not_try_losing_drafts_anew():
    clock = Clock()
    governor = Governor(clock=clock)
    drafted = {}
    for _ in range(4):
        governor.begins()
        for sequences in (8, 7, 6, 5):
            for _ in range(20):
                drafts = governor.drafts(sequences)
                drafted.setdefault(sequences, []).append(drafts)
                clock.now += sequences * (1.5 if drafts else 1.0)
                governor.ends(sequences, told=sequences)
    assert not any(drafted[sequences][0] for sequences in drafted), (
        "what a plain step of so many takes comes first"
    )
    tried = sum(map(sum, drafted.values()))
    assert 0 < tried <= 16, (
        "five at a time, which have lost six plain steps by the root of eight; a fortieth of 320 in all"
    )


def test_a_narrow_loss_is_tried_for_longer():
    drafted = run(160, plain=1.0, drafting=1.2, accepted=lambda step: 1)
    assert sum(drafted[:60]) >= 20
    assert not any(drafted[60:])


def test_chance_decides_nothing():
    """Half of the steps give one token and half give three, for the time of one and a half."""
    chance = random.Random(0)
    drafted = run(600, plain=1.0, drafting=1.5, accepted=lambda step: chance.choice([1, 3]))
    assert sum(drafted) > 500


@pytest.mark.parametrize("seed", range(5))
def test_loss_is_small_on_a_noisy_machine(seed):
    chance = random.Random(seed)
    drafted = run(500, plain=1.0, drafting=1.3, accepted=lambda step: 1, chance=chance)
    seconds = sum(1.3 if drafts else 1.0 for drafts in drafted)
    assert 500 / seconds > 0.97


def test_text_that_begins_to_repeat_is_noticed():
    drafted = run(1000, plain=1.0, drafting=1.5, accepted=lambda step: 1 if step < 200 else 4)
    again = drafted.index(True, 200)
    assert again < 530
    assert sum(drafted[again : again + 100]) >= 96  # but for a look at the plain step


@pytest.mark.parametrize(("drafting", "accepted"), [(1.2, 1), (2.0, 1.5), (12.0, 1), (30.0, 2.5)])
def test_what_losing_drafts_cost_is_bounded_however_dear_they_are(drafting, accepted):
    """Also where texts are short, each of which may repeat itself where the last one did not."""
    clock = Clock()
    governor = Governor(clock=clock)
    tokens = steps = 0
    for step in range(4000):
        if step % 100 == 0:
            governor.begins()
        drafts = governor.drafts()
        clock.now += drafting if drafts else 1.0
        governor.ends(accepted if drafts else 1)
        if step >= 1000:
            tokens, steps = tokens + (accepted if drafts else 1), steps + 1
        else:
            start = clock.now
    assert tokens / (clock.now - start) > 0.96
    assert steps == 3000


def texts(gains, steps=100):
    """Which steps of each text drafted: a draft takes 1.5 plain steps and gives as many tokens as its text says."""
    clock = Clock()
    governor = Governor(clock=clock)
    drafted = []
    for gain in gains:
        governor.begins()
        mine = []
        for _ in range(steps):
            mine.append(governor.drafts())
            clock.now += 1.5 if mine[-1] else 1.0
            governor.ends(gain if mine[-1] else 1)
        drafted.append(mine)
    return drafted


def test_a_text_that_loses_does_not_keep_the_next_one_from_drafting():
    first, second, *others = texts([1, 3, 1, 3, 1, 3])
    assert sum(first) == 13, "six plain steps lost, though it is the very first text"
    assert not any(first[20:])
    assert sum(second) >= 95
    assert [sum(mine) >= 95 for mine in others] == [False, True, False, True]


def test_texts_that_all_lose_are_tried_less_and_less():
    tried = [sum(mine) for mine in texts([1] * 40)]
    assert all(tried[:2]), "the first losses are free"
    assert sum(tried) * 0.5 <= 18 + 7 + 0.025 * 4000
    assert tried.count(0) >= 20


def test_wide_drafts_among_narrow_ones_are_not_overlooked():
    """Two of three steps draft next to nothing, the third is wide and loses: the median says nothing of it."""
    drafted = run(300, plain=1.0, drafting=1.0, accepted=lambda step: 1)
    assert sum(drafted) > 280
    clock = Clock()
    governor = Governor(clock=clock)
    lost = 0.0
    for step in range(300):
        drafts = governor.drafts()
        seconds = (2.5 if step % 3 == 0 else 1.0) if drafts else 1.0
        lost += seconds - 1
        clock.now += seconds
        governor.ends(1)
    assert 6 < lost < 8


def test_one_slow_step_is_no_verdict():
    drafted = run(200, plain=1.0, drafting=1.3, accepted=lambda step: 2)
    hiccup = drafted.index(True) + 20
    clock = Clock()
    governor = Governor(clock=clock)
    after = []
    for step in range(200):
        drafts = governor.drafts()
        after.append(drafts)
        clock.now += 60.0 if step == hiccup else 1.3 if drafts else 1.0
        governor.ends(2 if drafts else 1)
    assert sum(after[hiccup + 1 :]) > 100


def test_what_a_drafter_expects_spares_it_the_verdict_of_bad_luck():
    """Drafts that win on average go on where luck alone would have them rest."""

    def drafted(seed, expected):
        clock, chance = Clock(), random.Random(seed)
        governor = Governor(clock=clock)
        count = 0
        for _ in range(600):
            drafts = governor.drafts()
            count += drafts
            clock.now += 2.0 if drafts else 1.0
            tokens = chance.choice([1, 1, 1, 6]) if drafts else 1  # 2.25 on average
            governor.ends(tokens, 24 if drafts else 1, expected if drafts else None)
        return count

    assert sum(drafted(seed, 2.25) > 500 for seed in range(20)) >= 16
    assert sum(drafted(seed, None) > 500 for seed in range(20)) <= 4


def test_a_drafter_that_promises_too_much_is_found_out():
    clock = Clock()
    governor = Governor(clock=clock)
    drafted = []
    for _ in range(1000):
        drafted.append(governor.drafts())
        clock.now += 1.5 if drafted[-1] else 1.0
        governor.ends(1, 24 if drafted[-1] else 1, 2.0 if drafted[-1] else None)
    assert sum(drafted) < 80


def test_a_plain_step_behind_drafts_says_nothing_of_plain_steps():
    clock = Clock()
    governor = Governor(clock=clock, refresh=8)
    drafted, before = [], False
    for _ in range(400):
        drafts = governor.drafts()
        drafted.append(drafts)
        # Drafts lose a little, but not against the step that comes right behind them.
        clock.now += 1.25 if drafts else 1.5 if before else 1.0
        before = drafts
        governor.ends(1.2 if drafts else 1)
    assert sum(drafted[:200]) < 200 - 40, "they were found out"


def test_few_steps_of_a_long_rest_are_timed_and_all_are_counted():
    clock = Clock()
    reads = []

    def reading():
        reads.append(clock.now)
        return clock()

    governor = Governor(clock=reading)
    drafted = []
    for _ in range(2000):
        drafted.append(governor.drafts())
        clock.now += 1.5 if drafted[-1] else 1.0
        governor.ends(1)
    assert len(reads) < 2000
    lengths = [len(rest) for rest in "".join("d" if one else "." for one in drafted[4:]).split("d") if rest]
    assert lengths[1] == 2 * lengths[0] >= 480


def test_sequences_share_the_verdict():
    drafted = run(100, plain=2.0, drafting=5.0, accepted=lambda step: 2, sequences=4)
    assert sum(drafted) < 40


def test_of_a_batchs_average_gain_a_part_is_left_to_texts_that_lag():
    """Two tokens for the time of 1.9 plain steps: a gain of a text alone, none of eight that end one after another."""
    alone = run(400, plain=1.0, drafting=1.9, accepted=lambda step: 2)
    shared = run(400, plain=1.0, drafting=1.9, accepted=lambda step: 2, sequences=8)
    assert sum(alone) > 380
    assert sum(shared) < 100


def test_accounts_are_kept_by_the_number_of_sequences():
    """Eight sequences end one after another; drafts pay where four or fewer are left."""
    clock, drafted = Clock(), {}
    governor = Governor(clock=clock)
    for sequences in range(8, 0, -1):
        drafted[sequences] = 0
        for _ in range(60):
            drafts = governor.drafts(sequences)
            drafted[sequences] += drafts
            plain = 1.0 + 0.1 * sequences
            clock.now += plain * ((1.5 if sequences < 5 else 2.6) if drafts else 1.0)
            governor.ends(sequences * (2 if drafts else 1), told=sequences)
    assert all(drafted[sequences] < 20 for sequences in range(5, 9))
    assert all(drafted[sequences] > 50 for sequences in range(1, 5))


def test_a_step_in_which_a_sequence_ends_or_reads_its_prompt():
    clock = Clock()
    governor = Governor(clock=clock)
    for step in range(60):
        told, reads = 1 if step % 4 == 3 else 2, step % 4 == 1
        drafts = governor.drafts(2)
        # Two tokens a draft for the time of 1.5 steps; with one sequence at its prompt the step is slow and says nothing.
        clock.now += 40.0 if reads else 1.5 if drafts else 1.0
        governor.ends(told * (2 if drafts else 1), told * (4 if drafts else 1), told=told, counts=not reads)
    assert governor.drafts(2), "a share is of those that tell"


def test_time_between_texts_is_no_steps():
    clock = Clock()
    governor = Governor(clock=clock)
    for _ in range(20):
        governor.begins()
        for step in range(8):
            drafts = governor.drafts()
            clock.now += 1.4 if drafts else 1.0
            if step < 7:  # the last step of a text is not told
                governor.ends(2 if drafts else 1)
        clock.now += 1000.0
    governor.begins()
    assert governor.drafts()


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


def test_steps_correct_the_measured_cost():
    """The cost was measured on a busy machine, flat; in truth rows are dear."""
    clock = Clock()
    governor = Governor(clock=clock)
    measured = StepCost((1, 2, 4, 8, 16), (4.0, 4.2, 4.4, 5.0, 8.0))
    truth = StepCost((1, 2, 4, 8, 16), (2.0, 2.6, 4.0, 8.0, 16.0))
    assert governor.calibrate(measured) == measured
    chances, drafted = [0.5, 0.3, 0.2, 0.2, 0.1], []
    for _ in range(80):
        rows = 1 + (governor.calibrate(measured).best_rows(chances) if governor.drafts() else 0)
        drafted.append(rows - 1)
        clock.now += truth.of(rows)
        governor.ends(1, rows)
    corrected = governor.calibrate(measured)
    assert corrected.of(1) == pytest.approx(2.0, rel=0.05)
    assert corrected.of(4) == pytest.approx(truth.of(4), rel=0.3)
    assert measured.best_rows(chances) >= 4
    assert corrected.best_rows(chances) == truth.best_rows(chances) <= 1


def test_row_counts_without_a_time_take_the_nearest_ones_correction():
    clock = Clock()
    governor = Governor(clock=clock, first=1)
    rows = (1, 2, 4, 8, 16)
    measured = StepCost(rows, (1.0, 1.0, 1.0, 1.0, 1.0))
    governor.calibrate(measured)

    def step(took, count):
        governor.drafts()
        clock.now += took
        governor.ends(1, count)
        governor.drafts()  # judges the step before
        return governor.calibrate(measured).seconds

    assert step(2.0, 1) == (2.0,) * 5, "only a plain step is known"
    assert step(6.0, 13) == (2.0, 2.0, 2.0, 6.0, 6.0), "four rows are as near to one as to sixteen: as one"
    assert step(4.0, 3) == (2.0, 4.0, 4.0, 6.0, 6.0), "three rows are as near to two as to four: two's"


def test_a_step_may_be_judged_while_the_next_one_runs():
    clock = Clock()
    governor = Governor(clock=clock)
    cost = StepCost((1, 8), (2.0, 2.0))
    governor.calibrate(cost)
    drafted = []
    for _ in range(100):
        drafted.append(governor.drafts())
        clock.now += 0.25
        governor.judge()  # of the step before
        clock.now += 1.25 if drafted[-1] else 0.75
        governor.ends(1, 8 if drafted[-1] else 1, later=True)
        if len(drafted) == 18:
            assert governor.calibrate(cost).of(8) == pytest.approx(1.5, rel=0.1), "the steps' own time, whole"
    assert governor.calibrate(cost).of(1) == pytest.approx(1.0, rel=0.1)
    assert drafted[:6] == [False] * 5 + [True], "a step later than where each is judged at its end"
    assert sum(drafted) == 14, "likewise"
