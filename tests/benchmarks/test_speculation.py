"""The speculation benchmark's own logic: the guesser that knows the answer, and ratios within a round."""

import numpy as np

from benchmarks.speculation import Held, Known, Ran, ratios


def test_a_guesser_is_right_as_often_as_it_says() -> None:
    answer = list(range(1000))
    for acceptance in (0.0, 0.25, 1.0):
        guesser, right = Known(answer, 4, acceptance, 2000), 0
        for produced in range(0, 1000, 4):
            guess = guesser.guess(15)
            right += sum(a == b for a, b in zip(guess, answer[produced : produced + 4], strict=True))
            for token in answer[produced : produced + 4]:
                guesser.observe(token)
        assert abs(right / 1000 - acceptance) < 0.04
        assert guesser.guess(4) == []


def test_the_answer_is_held_to() -> None:
    sampler = Held([3, 1])
    assert [sampler.sample(np.eye(8, dtype=np.float32)[i]) for i in (5, 6)] == [3, 1]
    assert sampler.needs == 1


def test_ratios_are_taken_within_a_round() -> None:
    def ran(speed: float) -> Ran:
        return Ran((), speed, 0, 0)

    rounds = [{(0, 0.0): ran(10 * f), (2, 0.5): ran(f * r)} for f, r in ((1.0, 20.0), (0.5, 15.0), (3.0, 10.0))]
    assert ratios(rounds) == {(2, 0.5): 1.5}
