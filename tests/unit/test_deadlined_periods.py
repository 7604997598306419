"""What activations show: a period where there is one, within a per cent, and nothing where there is none."""

import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deadlined.periods import Inference, can_infer, infer, shows_patterns
from edgehold.kernel.switches import LOST, OUT, PREEMPTED, Activations

MS = 1_000_000
S = 1_000 * MS
SPAN = 3 * S

Times = list[int]


def seeded(seed: int) -> random.Random:
    return random.Random(seed)  # noqa: S311 - the same in each run


def every(period_ms: float, rng: random.Random, *, jitter: float = 0.0, span_ns: int = SPAN) -> Times:
    period = period_ms * MS
    begin = rng.random() * period + period
    return [
        round(begin + number * period + rng.uniform(-jitter, jitter) * period)
        for number in range(int((span_ns - begin) / period))
    ]


def after_pauses(pause_ms: Callable[[], float]) -> Times:
    now, times = 0.0, []
    while now < SPAN:
        now += pause_ms() * MS
        times.append(round(now))
    return times


def blocks(period_ms: float, count: int, gap_ms: float, rng: random.Random) -> Times:
    return [one + round(number * gap_ms * MS) for one in every(period_ms, rng) for number in range(count)]


def bursts(mean_ms: float, rng: random.Random) -> Times:
    now, times = 0.0, []
    while now < SPAN:
        now += rng.expovariate(1 / mean_ms) * MS
        for _ in range(rng.randint(2, 8)):
            now += 2 * MS
            times.append(round(now))
    return times


def near(found: Inference, period_ms: float, *, within: float = 0.01) -> bool:
    return found.period_ns is not None and abs(found.period_ns / (period_ms * MS) - 1) <= within


@pytest.fixture(params=range(5))
def rng(request: pytest.FixtureRequest) -> random.Random:
    return seeded(request.param)


@pytest.mark.parametrize("period_ms", [1, 10, 100 / 3, 40, 100, 200])
def test_a_strict_period_is_found(period_ms: float, rng: random.Random) -> None:
    found = infer(every(period_ms, rng))
    assert near(found, period_ms, within=0.0001)
    assert found.confidence == 1
    assert not found.reason


@pytest.mark.parametrize("period_ms", [10, 40, 100])
def test_jitter_of_a_tenth_is_borne(period_ms: float, rng: random.Random) -> None:
    assert near(infer(every(period_ms, rng, jitter=0.1)), period_ms, within=0.02)


@pytest.mark.parametrize("pause_ms", [10, 40, 100])
def test_a_relative_sleep_and_its_job_are_the_period(pause_ms: float, rng: random.Random) -> None:
    found = infer(after_pauses(lambda: pause_ms * (1 + 0.05 * rng.random())))
    assert near(found, pause_ms * 1.025, within=0.02)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("period_ms", [10, 40, 100])
def test_a_job_that_sleeps_in_its_middle_is_one_job(period_ms: float, count: int, rng: random.Random) -> None:
    times = blocks(period_ms, count, 0.1 * period_ms, rng)
    assert near(infer(times), period_ms, within=0.001)
    assert infer(times, patterns=False).period_ns is None


def test_one_that_is_left_out_now_and_then_does_not_change_it(rng: random.Random) -> None:
    times = every(10, rng)
    kept = [one for number, one in enumerate(times) if number % 40 != 39]
    assert near(infer(kept), 10)
    assert infer(kept).confidence < 1


@pytest.mark.parametrize(("fast_ms", "slow_ms"), [(20, 100), (20, 54), (10, 33.3), (20, 40), (30, 50), (25, 40)])
def test_of_two_rates_one_of_them_or_none(fast_ms: float, slow_ms: float, rng: random.Random) -> None:
    found = infer(sorted([*every(fast_ms, rng), *every(slow_ms, rng)]))
    assert found.period_ns is None or near(found, fast_ms) or near(found, slow_ms), found


def test_what_repeats_only_after_many_activations_is_no_period() -> None:
    # Some activations at odd distances, the same each time: the beat of several periods looks so.
    rng = seeded(1)
    within = sorted(rng.uniform(0, 160) for _ in range(6))
    times = [round((160 * number + one) * MS) for number in range(40) for one in within]
    found = infer(times)
    assert found.period_ns is None
    assert "repeat only every 160.0 ms, after 6" in found.reason


def aperiodic(rng: random.Random) -> Iterator[Times]:
    for mean_ms in (5, 10, 20, 50):
        yield after_pauses(lambda mean_ms=mean_ms: rng.expovariate(1 / mean_ms))  # type: ignore[misc]
        yield after_pauses(lambda mean_ms=mean_ms: rng.uniform(0, 2 * mean_ms))  # type: ignore[misc]
        yield after_pauses(lambda mean_ms=mean_ms: rng.uniform(0.5 * mean_ms, 1.5 * mean_ms))  # type: ignore[misc]
        yield bursts(mean_ms, rng)


@pytest.mark.parametrize("seed", range(20))
def test_randomness_has_no_period_however_often_it_is_asked(seed: int) -> None:
    for times in aperiodic(seeded(seed)):
        for until in (S, 3 * S // 2, 2 * S, SPAN):
            found = infer([one for one in times if one <= until])
            assert found.period_ns is None, found
            assert found.confidence == 0
            assert found.reason


def test_too_few_say_nothing() -> None:
    times = [number * 10 * MS for number in range(11)]
    assert infer(times).period_ns == 10 * MS
    found = infer(times[1:])
    assert found.period_ns is None
    assert "10 times" in found.reason
    assert "once" in infer([1]).reason
    assert infer([]).period_ns is None


@given(st.lists(st.integers(0, 10 * S), max_size=300))
def test_whatever_comes_is_judged(times: list[int]) -> None:
    ordered = sorted(times)
    found = infer(ordered)
    assert (found.period_ns is None) == bool(found.reason)
    if found.period_ns is not None:
        assert 0 < found.period_ns <= (ordered[-1] - ordered[0]) / 9
        assert 0 < found.confidence <= 1


@given(st.integers(0, 1000), st.integers(MS, 200 * MS), st.integers(0, 10**15))
def test_it_does_not_matter_when(seed: int, period_ns: int, offset_ns: int) -> None:
    times = every(period_ns / MS, seeded(seed), jitter=0.05, span_ns=40 * period_ns)
    assert infer([one + offset_ns for one in times]) == infer(times)


def test_stalls_that_did_not_move_activations_do_no_harm() -> None:
    # Released by the clock, held back for a fifth of the time: after every other activation, so the others are free.
    times = [number * 40 * MS for number in range(40)]
    stalls = [16 * MS if number % 2 else 0 for number in range(40)]
    assert infer(times, stalls).period_ns == 40 * MS


@pytest.mark.parametrize("patterns", [True, False])
def test_a_period_that_stalls_made_is_none(patterns: bool) -> None:
    # Its own is 21 ms; its budget, which is filled up every 100 ms, is used up by each job.
    times = [number * 100 * MS for number in range(30)]
    found = infer(times, [79 * MS] * 30, patterns=patterns)
    assert found.period_ns is None
    assert "kept waiting" in found.reason


def test_a_pattern_with_stalls_in_it_is_none() -> None:
    times = [number * 140 * MS + late for number in range(20) for late in (0, 40 * MS)]
    assert near(infer(times), 140)
    assert infer(times, [0 if number % 2 else 55 * MS for number in range(40)]).period_ns is None


@pytest.mark.parametrize(
    ("executed_ms", "waited_ms", "stalled_ms", "why"),
    [
        (400, 0, 0, ""),
        (100, 40, 0, ""),
        (100, 300, 260, ""),
        (20, 950, 950, "hardly ever sleeps: 2% of the time it ran, 95% it waited"),
        (1000, 0, 0, "hardly ever sleeps"),
        (100, 60, 0, "had to wait, for 6% of the time"),
    ],
)
def test_only_who_sleeps_and_runs_when_it_wants_is_judged(
    executed_ms: int, waited_ms: int, stalled_ms: int, why: str
) -> None:
    text = can_infer(S, executed_ms * MS, waited_ms * MS, stalled_ns=stalled_ms * MS)
    assert why in text
    assert bool(why) == bool(text)


def test_an_activation_is_the_first_run_after_a_sleep() -> None:
    seen = Activations()
    seen.feed([(10, 0), (20, OUT), (30, 0), (40, OUT | PREEMPTED), (50, 0)])
    seen.feed([(60, OUT)])
    assert list(seen.times_ns) == [30]
    seen.feed([(70, 0), (80, OUT), (90, 0)])
    assert list(seen.times_ns) == [30, 70, 90]
    assert list(seen.stalls_ns) == [0, 10, 0]
    assert seen.stalled_ns == 10


def test_throttling_is_no_activation() -> None:
    seen = Activations()
    seen.feed([(10, OUT | PREEMPTED), (110, 0), (112, OUT | PREEMPTED), (210, 0), (212, OUT), (215, 0)])
    assert list(seen.times_ns) == [215]
    assert list(seen.stalls_ns) == [198]


def test_where_records_are_missing_it_begins_anew() -> None:
    seen = Activations()
    seen.feed([(10, OUT), (20, 0), (30, OUT), (40, LOST), (50, 0), (60, OUT), (70, 0)])
    assert list(seen.times_ns) == [70]


def test_only_the_last_are_kept() -> None:
    seen = Activations(keep=4)
    for number in range(10):
        seen.feed([(2 * number, OUT), (2 * number + 1, 0)])
    assert list(seen.times_ns) == [13, 15, 17, 19]
    assert len(seen.stalls_ns) == 4


def test_patterns_are_looked_for_only_in_who_hardly_waits() -> None:
    assert shows_patterns(S, 9 * MS)
    assert not shows_patterns(S, 10 * MS)
