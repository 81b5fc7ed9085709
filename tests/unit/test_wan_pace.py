"""How far a job of the Wan engine is said to be, and how long it is said to take: by a clock that the tests turn."""

import math

import pytest

from rushes.engines.wan.pace import (
    AGAIN,
    DECODING,
    DENOISING,
    READING,
    WAITING,
    Meter,
    Paces,
    Seconds,
    Shape,
)
from rushes.requests.record import Progress

SMALL = Shape(832, 480, 81, guided=True)
LARGE = Shape(1664, 960, 81, guided=True)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def whole(
    paces: Paces, clock: Clock, shape: Shape, *, setup: float, step: float, decode: float, steps: int = 4
) -> list[Progress]:
    """A job that goes well, with all that it tells."""
    meter = Meter(paces, shape, steps, clock)
    told = [meter.begin()]
    clock.wait(setup)
    for number in range(1, steps + 1):
        clock.wait(step)
        told.append(meter.step(number))
    told.append(meter.denoised())
    for number in range(1, 14):
        clock.wait(decode / 4 if number % 4 == 1 else 0)  # the frames of one latent frame come together
        progress = meter.decoded(number, 13)
        if number % 4 == 1:
            told.append(progress)
    told.append(meter.ended())
    return told


def test_the_first_job_is_timed_by_its_own_steps_and_not_by_what_came_before_them() -> None:
    clock = Clock()

    told = whole(Paces(), clock, SMALL, setup=60, step=5, decode=6)

    assert [READING, *[DENOISING] * 4, *[DECODING] * 6] == [progress.stage for progress in told]
    assert [None, None, 15.0, None, None, None] == [progress.eta for progress in told[:6]]
    assert [(1, 4), (2, 4), (3, 4), (4, 4)] == [(progress.step, progress.steps) for progress in told[1:5]]
    assert [None, 3.0, 1.5, 0.0] == [progress.eta for progress in told[6:10]]


def test_the_first_job_with_fast_steps_and_a_long_decoding_is_never_said_to_end_before_it_does() -> None:
    told = whole(Paces(), Clock(), SMALL, setup=60, step=0.1, decode=600)

    assert [None] * 7 == [progress.eta for progress in told[:7]]
    assert [300.0, 150.0, 0.0, 0.0] == [progress.eta for progress in told[7:]]


def test_latent_frames_are_counted_and_not_frames() -> None:
    clock = Clock()
    meter = Meter(Paces(), SMALL, 2, clock)
    meter.begin()
    for number in (1, 2):
        clock.wait(5)
        meter.step(number)
    meter.denoised()
    told = []
    for number in range(1, 82):
        # What is compiled is in the first one; an encoder sets the pace of the others.
        clock.wait(60 if number == 1 else 0.5)
        told.append(meter.decoded(number, 81))

    assert [None] * 4 == [progress.eta for progress in told[:4]]
    assert [38.0, 37.5, 37.0, 36.5, 36.0] == [progress.eta for progress in told[4:9]]
    assert [(10 + 5 * part / 21) / 15 for part in (1, 1, 2)] == pytest.approx(
        [told[number].fraction for number in (0, 3, 4)], abs=1e-4
    )


@pytest.mark.parametrize("frames", [1, 2, 5, 6])
def test_the_last_frame_is_the_end_of_decoding(frames: int) -> None:
    meter = Meter(Paces(), SMALL, 1, Clock())
    meter.begin()
    meter.step(1)
    meter.denoised()
    told = [meter.decoded(number, frames) for number in range(1, frames + 1)]

    assert [0.0] == [progress.eta for progress in told if progress.fraction == 0.99]
    assert 0.99 == told[-1].fraction


def test_the_fraction_rises_from_nothing_to_all() -> None:
    told = whole(Paces(), Clock(), SMALL, setup=60, step=5, decode=6)

    fractions = [progress.fraction for progress in told]
    assert 0.0 == fractions[0]
    assert sorted(fractions) == fractions
    assert 1.0 == fractions[-1]
    assert 0.99 == max(fractions[:-1])


def test_the_second_job_of_a_size_knows_its_end_from_the_start() -> None:
    paces, clock = Paces(), Clock()
    whole(paces, clock, SMALL, setup=2, step=5, decode=6)

    told = whole(paces, clock, SMALL, setup=2, step=5, decode=6)

    assert [28.0, 21.0, 16.0, 11.0, 6.0, 6.0] == [progress.eta for progress in told[:6]]
    assert [0.0, 5 / 26, 10 / 26, 15 / 26, 20 / 26] == pytest.approx(
        [progress.fraction for progress in told[:5]], abs=1e-4
    )


def test_time_that_passes_within_a_step_is_taken_off() -> None:
    paces, clock = Paces(), Clock()
    whole(paces, clock, SMALL, setup=2, step=5, decode=6)
    meter = Meter(paces, SMALL, 4, clock)
    meter.begin()
    clock.wait(60)

    assert 4 * 5 + 6 - 5 + 2 - 2 == meter._left()  # no more than what one step takes


def test_what_compiling_took_is_forgotten_with_the_second_job() -> None:
    paces, clock = Paces(), Clock()
    whole(paces, clock, SMALL, setup=300, step=5, decode=6)
    whole(paces, clock, SMALL, setup=1, step=5, decode=6)

    assert Seconds(setup=1, step=5, decode=6) == paces.of(SMALL)


def test_one_slow_job_changes_nothing() -> None:
    paces, clock = Paces(), Clock()
    for step in (5, 5, 50):
        whole(paces, clock, SMALL, setup=0, step=step, decode=6)

    assert Seconds(0, 5, 6) == paces.of(SMALL)


def test_a_size_never_seen_is_estimated_from_the_nearest_one() -> None:
    paces = Paces()
    paces.learn(SMALL, Seconds(2, 5, 6))
    paces.learn(Shape(64, 64, 9, guided=True), Seconds(2, 0.1, 0.1))

    assert Seconds(2, 5 * 4**1.5, 24) == paces.of(LARGE)


def test_a_step_without_guidance_is_one_pass_of_two() -> None:
    paces = Paces()
    paces.learn(SMALL, Seconds(2, 5, 6))

    assert Seconds(2, 2.5, 6) == paces.of(SMALL._replace(guided=False))


def test_where_nothing_was_seen_nothing_is_claimed() -> None:
    paces = Paces()
    meter = Meter(paces, SMALL, 4, Clock())

    assert paces.of(SMALL) is None
    assert Progress(0.0, WAITING) == meter.waiting()
    assert Progress(0.0, READING) == meter.begin()


def test_a_job_that_begins_again_says_so_and_goes_back() -> None:
    clock = Clock()
    meter = Meter(Paces(), SMALL, 2, clock)
    meter.begin()
    clock.wait(5)
    before = meter.step(1)

    again = meter.again(denoised=False)

    assert before.fraction > 0
    assert (AGAIN, 0.0) == (again.stage, again.fraction)
    assert READING == meter.begin().stage


@pytest.mark.parametrize("steps", [1, 2])
def test_decoding_again_keeps_what_the_denoising_has_done(steps: int) -> None:
    paces, clock = Paces(), Clock()
    meter = Meter(paces, SMALL, steps, clock)
    meter.begin()
    for number in range(1, steps + 1):
        clock.wait(5)
        meter.step(number)
    denoised = meter.denoised()
    meter.decoded(1, 5)

    clock.wait(100)
    again = meter.again(denoised=True)
    clock.wait(100)
    assert denoised.fraction == meter.denoised().fraction
    clock.wait(3)
    ended = meter.ended()

    assert (AGAIN, denoised.fraction) == (again.stage, again.fraction)
    assert 1.0 == ended.fraction
    assert Seconds(0, 5, 3) == paces.of(SMALL)


def test_a_clock_that_stands_still_breaks_nothing() -> None:
    told = whole(Paces(), Clock(), SMALL, setup=0, step=0, decode=0)

    assert all(math.isfinite(progress.fraction) for progress in told)
    assert all(progress.eta is None or math.isfinite(progress.eta) for progress in told)
    assert 1.0 == told[-1].fraction


def test_only_so_many_sizes_are_kept() -> None:
    paces = Paces()
    for width in range(16, 16 * 200, 16):
        paces.learn(Shape(width, 64, 9, guided=True), Seconds(0, width, 0))

    assert 16 * 199 == paces.of(Shape(16 * 199, 64, 9, guided=True)).step  # type: ignore[union-attr]
    assert len(paces._runs) <= 64
