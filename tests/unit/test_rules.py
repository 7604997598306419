"""The reference rule against its source: NANCY D3.4 §4, Figure 23, and the budgets of Figure 24."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deadlined.rules import ReferenceRule, RuleConfig

MS = 1_000_000
CONFIG = RuleConfig(
    period_ns=100 * MS, initial_budget_ns=2 * MS, overallocation=0.1, window=5, cap=0.8, min_budget_ns=1 * MS
)


def figure_23(samples: list[int], config: RuleConfig) -> list[int]:
    """The pseudo-code, word for word, with the cap of the experiment and our floor."""
    multiplier, largest_old = 1, -1
    array: list[int] = []
    budgets: list[int] = []
    for c in samples:
        array = [*array, c][-config.window :]
        largest = max(array)
        if largest_old != -1:
            multiplier = multiplier * 2 if largest > largest_old else 1
        q = largest * (1 + config.overallocation * multiplier)
        largest_old = largest
        budgets.append(min(max(round(q), config.min_budget_ns), int(config.cap * config.period_ns)))
    return budgets


def test_the_path_of_the_deliverable() -> None:
    # What a thread that starts with 2 ms and needs 10 executed, in ms a period, in a run on a real kernel.
    executed = [2.18, 2.83, 4.29, 8.67, 24.73, 40.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0]
    rule = ReferenceRule(CONFIG)
    budgets = [rule.step(round(c * MS)) / MS for c in executed]
    assert budgets[:6] == pytest.approx([2.4, 3.4, 6.0, 15.6, 64.3, 80.0], rel=0.01)
    # The backlog's sample stays the largest for N - 1 more cycles, then the budget is a little above the need.
    assert budgets[6:10] == pytest.approx([44.0] * 4)
    assert budgets[10:] == pytest.approx([11.0] * 2)


def test_a_thread_that_uses_all_it_gets_reaches_the_cap_in_seven_cycles() -> None:
    rule = ReferenceRule(CONFIG)
    for _ in range(7):
        rule.step(rule.budget_ns)
    assert rule.budget_ns == 80 * MS


def test_the_first_sample_never_doubles() -> None:
    rule = ReferenceRule(CONFIG)
    assert rule.step(5 * MS) == round(5.5 * MS)
    assert rule.multiplier == 1


def test_an_idle_thread_falls_to_the_floor_and_a_busy_one_stops_at_the_cap() -> None:
    rule = ReferenceRule(CONFIG)
    assert rule.step(0) == 1 * MS
    assert rule.step(100 * MS) == 80 * MS


def test_equal_is_not_growth() -> None:
    rule = ReferenceRule(CONFIG)
    for _ in range(3):
        rule.step(10 * MS)
    assert rule.multiplier == 1


@given(
    samples=st.lists(st.integers(0, 200 * MS), max_size=60),
    window=st.integers(1, 20),
    overallocation=st.floats(0.001, 4),
    cap=st.floats(0.05, 0.95),
)
def test_it_is_figure_23(samples: list[int], window: int, overallocation: float, cap: float) -> None:
    config = replace(CONFIG, window=window, overallocation=overallocation, cap=cap)
    rule = ReferenceRule(config)
    assert [rule.step(c) for c in samples] == figure_23(samples, config)


def test_a_week_of_slow_growth_does_not_overflow() -> None:
    rule = ReferenceRule(CONFIG)
    for c in range(1, 20_000):
        rule.step(c)
    assert rule.budget_ns == 80 * MS


def test_a_replay_gives_the_same_budgets() -> None:
    samples = [(n * 7919) % (50 * MS) for n in range(500)]
    runs = []
    for _ in range(2):
        rule = ReferenceRule(CONFIG)
        runs.append([rule.step(c) for c in samples])
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"min_budget_ns": 90 * MS}, "min_budget_ns"),
        ({"initial_budget_ns": 81 * MS}, "initial_budget_ns"),
        ({"initial_budget_ns": MS // 2}, "initial_budget_ns"),
        ({"period_ns": 1 * MS}, "cap x period_ns"),
    ],
)
def test_a_policy_that_contradicts_itself_is_named(change: dict[str, int], named: str) -> None:
    assert named in replace(CONFIG, **change).problem()
    assert not CONFIG.problem()
