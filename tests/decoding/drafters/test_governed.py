"""A drafter with a governor drafts, rests and drafts again, and never changes a text."""

from comparing import request, run, runner_of

from shoestring.decoding.drafters.lookahead import LookaheadDrafter
from shoestring.decoding.governor import Governor


class Counting(LookaheadDrafter):
    proposed = observed = 0

    def propose(self, context, budget):
        self.proposed += 1
        return super().propose(context, budget)

    def observe(self, step):
        self.observed += 1
        super().observe(step)


def decoded(drafter, governor=None):
    if governor:
        drafter.governor = governor
    return run(runner_of("llama"), [request([3, 1, 4, 1, 5, 9, 2, 6], drafter, most=60)])


def test_text_is_the_plain_one_whatever_the_clock_says():
    plain = decoded(None)
    for tick in (0.0, 1.0):  # steps that take no time, and steps of which each looks dearer than the last
        now = [0.0, tick]

        def clock(now=now):
            now[0] += now[1]
            now[1] *= 1.3
            return now[0]

        drafter = Counting(4, 3, 4)
        assert decoded(drafter, Governor(clock=clock)) == plain
        assert 0 < drafter.observed <= drafter.proposed
        if tick:
            assert drafter.proposed < 40, "it never rested"


def test_nothing_is_drafted_on_the_prompts_step():
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]

    class Watching(Counting):
        def propose(self, context, budget):
            assert len(context.tokens) > len(prompt)
            return super().propose(context, budget)

    watching = Watching(2, 3, 2)
    decoded(watching, Governor(first=1))
    assert watching.proposed
