"""The rules against their sources: NANCY D3.4 §4, Figure 23, the budgets of Figure 24, and docs/deadlined.md."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deadlined.rules import RuleConfig, Sizer, replay, rule_config
from edgehold.api.deadlined import Policy, Rule
from edgehold.kernel.limits import DL_MAX_PERIOD_NS, DL_MIN_PERIOD_NS, DL_MIN_RUNTIME_NS
from edgehold.kernel.native_held import PHASE_BEGIN, Sizing
from tests.unit.deadlined_fake import sample
from tests.unit.deadlined_rule_model import Model, Window

MS = 1_000_000
REFERENCE = RuleConfig(
    rule=Rule.REFERENCE,
    period_ns=100 * MS,
    initial_budget_ns=2 * MS,
    overallocation=0.1,
    window=5,
    cap=0.8,
    min_budget_ns=1 * MS,
)
FAST = replace(REFERENCE, rule=Rule.FAST, initial_budget_ns=10 * MS)


def step(
    sizer: Sizer,
    executed_ns: float,
    *,
    run_delay_ms: float = 0,
    budget_ns: int | None = None,
    throttled: bool | None = None,
) -> int:
    """A window of one period, in which so much was executed."""
    return sizer.step(
        elapsed_ns=sizer.config.period_ns,
        executed_ns=round(executed_ns),
        run_delay_ns=round(run_delay_ms * MS),
        budget_ns=budget_ns,
        throttled=throttled,
    )


def never_slept(sizer: Sizer) -> int:
    """A window in which it had its budget and waited for more in all the rest."""
    used = sizer.budget_ns
    return step(sizer, used, run_delay_ms=(sizer.config.period_ns - used) / MS)


def test_the_path_of_the_deliverable() -> None:
    # A thread that starts with 2 ms and needs 10 uses all that it gets, then works its backlog off at 40 ms a period.
    sizer = Sizer(REFERENCE)
    budgets = [step(sizer, sizer.budget_ns) / MS for _ in range(5)]
    assert budgets == pytest.approx([2.4, 3.4, 6.0, 15.6, 64.3], rel=0.03)
    assert step(sizer, 40 * MS) == 80 * MS
    # The backlog's sample stays the largest for N - 1 more cycles, then the budget is a little above the need.
    assert [step(sizer, 10 * MS) / MS for _ in range(6)] == pytest.approx([44.0] * 4 + [11.0] * 2)


def test_a_thread_that_uses_all_it_gets_reaches_the_cap_in_six_cycles() -> None:
    sizer = Sizer(REFERENCE)
    for _ in range(6):
        step(sizer, sizer.budget_ns)
    assert sizer.budget_ns == 80 * MS


def test_the_first_sample_is_growth_where_anything_was_executed() -> None:
    """Figure 23's loop has its first turn at the attach, with nothing executed yet."""
    sizer = Sizer(REFERENCE)
    assert (step(sizer, 5 * MS), sizer.multiplier) == (6 * MS, 2)
    assert (step(sizer, 5 * MS), sizer.multiplier) == (round(5.5 * MS), 1)
    sizer = Sizer(REFERENCE)
    assert (step(sizer, 0), sizer.multiplier) == (1 * MS, 1)


@pytest.mark.parametrize("rule", [Rule.FAST, Rule.REFERENCE])
def test_an_idle_thread_falls_to_the_floor_and_a_busy_one_stops_at_the_cap(rule: Rule) -> None:
    sizer = Sizer(replace(REFERENCE, rule=rule))
    assert step(sizer, 0) == 1 * MS
    step(sizer, 100 * MS)  # fast: not more than forty times what it had
    assert step(sizer, 100 * MS) == 80 * MS


def test_equal_is_not_growth() -> None:
    sizer = Sizer(REFERENCE)
    for _ in range(3):
        step(sizer, 10 * MS)
    assert sizer.multiplier == 1


def test_a_week_of_slow_growth_does_not_overflow() -> None:
    sizer = Sizer(REFERENCE)
    for c in range(1, 20_000):
        step(sizer, c)
    assert sizer.budget_ns == 80 * MS
    assert sizer.multiplier == 2**40


def test_a_fixed_budget_is_fixed() -> None:
    sizer = Sizer(replace(REFERENCE, rule=Rule.FIXED))
    never_slept(sizer)
    assert sizer.saturated
    assert step(sizer, 0) == 2 * MS
    sizer.change(replace(REFERENCE, rule=Rule.FIXED, initial_budget_ns=30 * MS))
    assert sizer.budget_ns == 30 * MS


def test_fast_gives_the_cap_at_once_drops_the_backlog_and_then_follows() -> None:
    sizer = Sizer(FAST)
    assert (never_slept(sizer), sizer.saturated) == (80 * MS, True)
    # The end of the backlog: says nothing.
    assert (step(sizer, 50 * MS), sizer.saturated) == (80 * MS, False)
    assert step(sizer, 20 * MS) == 22 * MS
    assert step(sizer, 20.4 * MS) == 22 * MS  # a quarter of the overallocation: not worth a call
    assert step(sizer, 21 * MS) == round(23.1 * MS)
    for _ in range(5):
        step(sizer, 20.5 * MS)
    assert sizer.budget_ns == round(23.1 * MS)  # less than 5 % below
    for _ in range(5):
        step(sizer, 19 * MS)
    assert sizer.budget_ns == round(20.9 * MS)


def test_waiting_alone_is_no_saturation() -> None:
    """What other deadline threads do to one that is sized right: it waits, and sleeps all the same."""
    sizer = Sizer(replace(FAST, initial_budget_ns=11 * MS))
    for _ in range(100):
        assert step(sizer, 10 * MS, run_delay_ms=60) == 11 * MS
        assert not sizer.saturated


def test_a_budget_near_the_period_leaves_little_sleep_to_see() -> None:
    sizer = Sizer(replace(FAST, cap=0.95, initial_budget_ns=90 * MS))
    step(sizer, 85 * MS, run_delay_ms=8, budget_ns=90 * MS)  # 0.93 of it: asleep as much as such a thread can be
    assert not sizer.saturated
    step(sizer, 88 * MS, run_delay_ms=8, budget_ns=90 * MS)
    assert sizer.saturated


@pytest.mark.parametrize(
    ("c", "waited_ms", "first", "saturated", "again"),
    [
        (9.2, 70, False, False, False),  # it did not use its budget
        (9.4, 0, False, False, True),  # a job that ran over: looked at again, and no more
        (9.4, 40, False, False, True),
        (9.4, 60, False, True, True),  # awake in most of the window
        (9.4, 0, True, True, True),  # in the first window the kernel may not have counted any of its waiting
        (9.2, 0, True, False, False),
    ],
)
def test_throttled_at_this_moment(c: float, waited_ms: int, first: bool, saturated: bool, again: bool) -> None:
    sizing = Sizing(FAST.raw(), 10 * MS)
    sizing.state.phase = PHASE_BEGIN if first else 0
    told = sizing.step(
        elapsed_ns=100 * MS,
        executed_ns=round(c * MS),
        run_delay_ns=waited_ms * MS,
        budget_ns=10 * MS,
        throttled=1,
        saturated=-1,
    )
    assert (bool(sizing.state.saturated), told) == (saturated, again)


def test_a_tiny_budget_does_not_ask_for_all_of_the_host() -> None:
    sizer = Sizer(replace(FAST, initial_budget_ns=MS))
    assert [never_slept(sizer) for _ in range(2)] == [40 * MS, 80 * MS]
    # What the host did not let it have is still what it wants.
    assert step(sizer, MS // 10, run_delay_ms=99.9, budget_ns=MS // 10) == 80 * MS


def test_a_saturated_thread_is_looked_at_ten_times_in_a_row() -> None:
    sizing = Sizing(FAST.raw(), FAST.initial_budget_ns)
    awake = {"elapsed_ns": 100 * MS, "run_delay_ns": 0, "throttled": -1, "saturated": -1}
    again = [sizing.step(executed_ns=100 * MS, budget_ns=80 * MS, **awake) for _ in range(12)]
    assert again == [True] * 10 + [False] * 2
    assert not sizing.step(executed_ns=10 * MS, budget_ns=80 * MS, **awake)
    assert sizing.step(executed_ns=100 * MS, budget_ns=80 * MS, **awake)


def test_a_suspicion_takes_a_look_and_changes_nothing() -> None:
    sizing = Sizing(FAST.raw(), 10 * MS)
    window = {"elapsed_ns": 100 * MS, "budget_ns": 10 * MS, "throttled": 0, "saturated": -1}
    assert sizing.step(executed_ns=round(9.4 * MS), run_delay_ns=6 * MS, **window)
    before = sizing.state.wanted_ns
    assert not sizing.step(executed_ns=round(9.4 * MS), run_delay_ns=6 * MS, **window)
    assert sizing.state.wanted_ns == before
    assert sizing.state.filled == 1


@st.composite
def configs(draw: st.DrawFn, rule: Rule) -> RuleConfig:
    period_ns = draw(st.integers(DL_MIN_PERIOD_NS, DL_MAX_PERIOD_NS))
    cap = draw(st.floats(0.05, 0.95))
    floor_ns = draw(st.integers(DL_MIN_RUNTIME_NS, int(cap * period_ns)))
    return RuleConfig(
        rule=rule,
        period_ns=period_ns,
        initial_budget_ns=draw(st.integers(floor_ns, int(cap * period_ns))),
        overallocation=draw(st.floats(0.001, 4)),
        window=draw(st.integers(1, 64)),
        cap=cap,
        min_budget_ns=floor_ns,
    )


maybe = st.sampled_from([None, None, False, True])
parts = st.floats(0, 1.2)
Drawn = tuple[int, float, float, bool | None, bool | None, bool]
steps: st.SearchStrategy[list[Drawn]] = st.lists(
    st.tuples(st.integers(1, 2**40), parts, parts, maybe, maybe, st.booleans()), max_size=40
)


@pytest.mark.parametrize("rule", list(Rule))
@settings(deadline=None)
@given(data=st.data(), windows=steps)
def test_the_rules_are_what_the_documents_say(rule: Rule, data: st.DataObject, windows: list[Drawn]) -> None:
    config = data.draw(configs(rule))
    begins = rule is Rule.FAST and data.draw(st.booleans())
    model = Model(config, begins=begins)
    sizing = Sizing(config.raw(), config.initial_budget_ns)
    sizing.state.phase = PHASE_BEGIN if begins else 0
    for elapsed, executed, waited, throttled, saturated, limited in windows:
        # Around the budget, where the thresholds are.
        budget_ns = model.wanted_ns if limited else 0
        window = Window(
            elapsed_ns=elapsed,
            executed_ns=int(executed * (budget_ns or config.period_ns) / config.period_ns * elapsed),
            run_delay_ns=int(waited * elapsed),
            budget_ns=budget_ns,
            throttled=throttled,
            saturated=saturated,
        )
        model.step(window)
        again = sizing.step(
            elapsed_ns=window.elapsed_ns,
            executed_ns=window.executed_ns,
            run_delay_ns=window.run_delay_ns,
            budget_ns=window.budget_ns,
            throttled=-1 if window.throttled is None else int(window.throttled),
            saturated=-1 if window.saturated is None else int(window.saturated),
        )
        state = sizing.state
        assert (state.wanted_ns, state.multiplier) == (model.wanted_ns, model.multiplier)
        assert (bool(state.saturated), again) == (model.saturated, model.again)


@settings(deadline=None)
@given(
    data=st.data(),
    rules=st.tuples(st.sampled_from(Rule), st.sampled_from(Rule)),
    times=st.lists(st.tuples(*[st.integers(0, 2**64 - 1)] * 4), max_size=30),
)
def test_a_budget_never_leaves_its_bounds_whatever_is_measured(
    data: st.DataObject, rules: tuple[Rule, Rule], times: list[tuple[int, int, int, int]]
) -> None:
    first, second = (data.draw(configs(rule)) for rule in rules)
    sizer = Sizer(first)
    for number, (elapsed, executed, waited, budget) in enumerate(times):
        if number == len(times) // 2:
            sizer.change(second)
        sizer.step(elapsed_ns=elapsed, executed_ns=executed, run_delay_ns=waited, budget_ns=budget)
        assert sizer.config.min_budget_ns <= sizer.budget_ns <= sizer.config.max_budget_ns


@settings(deadline=None)
@given(
    samples=st.lists(st.integers(0, 80 * MS), min_size=1, max_size=100),
    before=st.integers(1, 64),
    after=st.integers(1, 64),
)
def test_what_was_learned_stays_under_another_window(samples: list[int], before: int, after: int) -> None:
    """The newest samples, in their order: the largest is dropped when its time has come, not sooner, not later."""
    sizer = Sizer(replace(REFERENCE, window=before))
    for c in samples:
        step(sizer, c)
    sizer.change(replace(REFERENCE, window=after))
    kept = samples[-before:][-after:]
    for _ in range(after + 1):
        kept = [*kept, 0][-after:]
        step(sizer, 0)
        assert sizer.budget_ns >= min(max(kept), 80 * MS)
    assert sizer.budget_ns == 1 * MS


def test_another_period_is_the_same_share() -> None:
    sizer = Sizer(replace(REFERENCE, initial_budget_ns=20 * MS))
    for _ in range(2):
        step(sizer, 20 * MS)
    step(sizer, 20 * MS)
    sizer.change(sizer.config.with_period(40 * MS))
    assert sizer.budget_ns == round(8.8 * MS)
    assert step(sizer, 8 * MS) == round(8.8 * MS)
    assert sizer.multiplier == 1  # no growth: the same need
    sizer.change(replace(sizer.config, cap=0.1))
    assert sizer.budget_ns == 4 * MS


def test_another_rule_begins_where_the_old_one_was() -> None:
    sizer = Sizer(FAST)
    never_slept(sizer)
    sizer.change(REFERENCE)
    assert sizer.budget_ns == 80 * MS
    assert [step(sizer, 10 * MS) for _ in range(2)] == [12 * MS, 11 * MS]


def test_no_window_is_no_step() -> None:
    sizer = Sizer(FAST)
    assert sizer.step(elapsed_ns=0, executed_ns=5, run_delay_ns=5) == 10 * MS


@settings(deadline=None)
@given(period_ns=st.integers(DL_MIN_PERIOD_NS, DL_MAX_PERIOD_NS))
def test_with_another_period_the_policy_still_holds(period_ns: int) -> None:
    config = rule_config(Policy()).with_period(period_ns)
    assert config.problem() == ""
    assert config.initial_budget_ns == pytest.approx(period_ns / 10, abs=1)


def test_a_replay_gives_the_same_budgets() -> None:
    samples = [sample(n, executed_ms=(n * 7919) % 50) for n in range(500)]
    for rule in Rule:
        runs = [replay(samples, Policy(rule=rule), cycle_ns=500 * MS) for _ in range(2)]
        assert runs[0] == runs[1]
        assert len(runs[0]) == 500


def test_a_replay_leaves_short_looks_to_the_fast_rule() -> None:
    short = sample(1, elapsed_ns=100 * MS, executed_ms=90)
    assert replay([short], Policy(rule=Rule.REFERENCE), cycle_ns=500 * MS) == [(10 * MS, False)]
    assert replay([short], Policy(), cycle_ns=500 * MS) == [(80 * MS, False)]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"min_budget_ns": 90 * MS}, "min_budget_ns"),
        ({"initial_budget_ns": 81 * MS}, "initial_budget_ns"),
        ({"initial_budget_ns": MS // 2}, "initial_budget_ns"),
        ({"period_ns": 1 * MS}, "cap x period_ns"),
    ],
)
def test_a_policy_that_contradicts_itself_is_named(change: dict[str, Any], named: str) -> None:
    assert named in replace(REFERENCE, **change).problem()
    assert not REFERENCE.problem()
