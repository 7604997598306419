"""What the experiment reckons with: made-up runs whose answers are known."""

from collections.abc import Sequence
from dataclasses import replace

import msgspec
import pytest

from edgehold.api.deadlined import Sample
from edgehold.clock import NS_PER_MS
from edgehold.testing.jobs import Job
from experiment import report
from experiment.analysis import (
    GOOD_JOBS,
    VARIANTS,
    Held,
    Run,
    Summary,
    budget_at,
    cycle_of,
    first_good,
    settled_from,
    summary,
)
from experiment.bars import BARS, PATH_MS, Verdict, verdicts

MS = NS_PER_MS
BEGIN = 1000 * MS
T = 500 * MS


def job(number: int, *, response_ms: float, executed_ms: float = 10.0) -> Job:
    release = BEGIN + number * 100 * MS
    return Job(number, release, release, release + round(response_ms * MS), round(executed_ms * MS))


def sample(end_ns: int, budget_ms: float) -> Sample:
    return Sample(
        time_ns=end_ns, tid=1, elapsed_ns=T, executed_ns=50 * MS, run_delay_ns=0, budget_ns=round(budget_ms * MS),
        wanted_ns=0, period_ns=100 * MS,
    )  # fmt: skip


def thread(budgets_ms: Sequence[float], jobs: list[Job]) -> Held:
    """Windows of T, each with the budget that was in force in it; the cycle is 3 ms late."""
    samples = tuple(sample(BEGIN + (k + 1) * T + 3 * MS, budget) for k, budget in enumerate(budgets_ms))
    return Held(
        work_ns=10 * MS,
        attached_ns=BEGIN,
        first_budget_ns=round(budgets_ms[0] * MS),
        samples=samples,
        jobs=tuple(jobs),
        request_ms=3,
    )


def run(*threads: Held, variant: int = 0, first_ms: float = 2.0, number: int = 1) -> Run:
    return Run(
        variant=VARIANTS[variant], first_budget_ns=round(first_ms * MS), number=number, threads=threads,
        setattr_calls=7, cycles=20, others_cpus=0.1, capacity_cpus=1.8,
    )  # fmt: skip


def good_after(jobs_late: int, total: int = 100) -> list[Job]:
    return [job(n, response_ms=400 if n < jobs_late else 10.5) for n in range(total)]


def test_a_budget_is_in_force_from_the_end_of_the_window_before() -> None:
    steps = thread([2, 2, 5, 5, 11], []).budgets()
    assert [(at - BEGIN) // MS for at, _ in steps] == [0, 1003, 2003]
    assert [budget / MS for _, budget in steps] == [2, 5, 11]
    assert budget_at(steps, BEGIN - 1) == budget_at(steps, BEGIN) == 2 * MS
    assert budget_at(steps, BEGIN + 1003 * MS) == 5 * MS
    assert budget_at(steps, BEGIN + 10**12) == 11 * MS


@pytest.mark.parametrize(("at_ms", "cycle"), [(0, 1), (1, 1), (500, 1), (500.001, 2), (3500, 7), (3500.1, 8)])
def test_cycles_count_from_the_attachment(at_ms: float, cycle: int) -> None:
    assert cycle_of(BEGIN + round(at_ms * MS), BEGIN, T) == cycle


def test_the_first_good_job_is_one_of_ten_in_a_row() -> None:
    jobs = [job(n, response_ms=10) for n in range(GOOD_JOBS - 1)]
    assert first_good(jobs) is None
    jobs.append(job(9, response_ms=11.1))
    assert first_good(jobs) is None
    jobs.extend(job(n, response_ms=11) for n in range(10, 10 + GOOD_JOBS))
    assert first_good(jobs) == 10


def test_settled_is_for_good() -> None:
    assert settled_from([3, 1.2, 3, 1.2, 1.1], 1.25) == 4
    assert settled_from([1.1, 1.1], 1.25) == 1
    assert settled_from([1.1, 1.3], 1.25) is None


def test_a_run_in_figures() -> None:
    budgets = [2, 4, 8, 80, 80, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 12]
    one = run(thread(budgets, good_after(20)))
    said = summary(one, one.threads[0])
    # Window k + 1 has the budget that was set after cycle k.
    assert said.path_ms[:6] == (4, 8, 80, 80, 11, 11)
    assert said.need_ms == 10
    assert (said.good_cycle, said.good_ms) == (5, 2010.5)
    assert (said.peak_ms, said.peak_cycle) == (80, 3)
    assert said.settled_cycle == 5
    assert said.steady == pytest.approx((1.1, 1.11, 1.2))
    assert said.worst_response_ms == 400
    assert said.late == 0


def test_late_jobs_after_the_first_good_ones_are_counted() -> None:
    jobs = [*good_after(5, 30), job(30, response_ms=12), job(31, response_ms=10)]
    one = run(thread([2] * 8, jobs))
    assert summary(one, one.threads[0]).late == 1


@pytest.mark.parametrize(("budgets", "jobs"), [([2.0] * 8, []), ([2.0, 2.0], good_after(0))])
def test_a_run_without_jobs_or_cycles_says_so(budgets: list[float], jobs: list[Job]) -> None:
    one = run(thread(budgets, jobs))
    with pytest.raises(ValueError, match="10 ms"):
        summary(one, one.threads[0])


def perfect(variant: str, first_ms: float, work_ms: float) -> Summary:
    path = (*PATH_MS, *[11.0] * 20)
    return Summary(
        variant=variant, first_budget_ms=first_ms, number=1, work_ms=work_ms, need_ms=work_ms, path_ms=path,
        good_cycle=1, good_ms=300, peak_ms=80, peak_cycle=6, settled_cycle=4, fits=(1.1,) * 20, steady=(1.1, 1.1, 1.1),
        worst_response_ms=200, late=0,
    )  # fmt: skip


ALL = [perfect(one.key, first, work) for one in VARIANTS for first in (2.0, 8.0) for work in (10, 20)]


def test_every_bar_is_asked_and_can_be_met() -> None:
    found = verdicts(ALL)
    assert [one.what for one in found] == [bar.what for bar in BARS]
    assert all(one.good for one in found)


@pytest.mark.parametrize(
    ("bar", "index", "change"),
    [
        (0, 0, {"path_ms": (2.4, 3.4, 6.0, 13.0, 64.0, 80.0)}),
        (0, 1, {"path_ms": (2.8, 3.4, 6.0, 15.6, 64.0, 80.0)}),
        (1, 0, {"good_cycle": 8}),
        (1, 1, {"good_cycle": None, "good_ms": None}),
        (2, 2, {"good_cycle": 7}),
        (3, 4, {"good_cycle": 3}),
        (4, 7, {"fits": (2.0, 2.0, 2.0, 1.16, 1.1)}),
        (5, 8, {"good_ms": 501.0}),
        (5, 8, {"good_cycle": None, "good_ms": None}),
        (6, 11, {"fits": (2.0, 2.0, 2.0, 1.16, 1.1)}),
    ],
)
def test_a_missed_bar_is_named(bar: int, index: int, change: dict[str, object]) -> None:
    seen = [*ALL[:index], replace(ALL[index], **change), *ALL[index + 1 :]]  # type: ignore[arg-type]
    found = verdicts(seen)
    assert [number for number, one in enumerate(found) if not one.good] == [bar]
    assert found[bar].line().startswith("MISSED  0 of 1")
    assert f"{ALL[index].work_ms:g} ms thread" in found[bar].line()


def test_a_repetition_that_misses_is_one_of_them() -> None:
    again = [replace(one, number=2) for one in ALL]
    again[0] = replace(again[0], good_cycle=9)
    found = verdicts([*ALL, *again])[1]
    assert (found.held, found.repetitions, found.good) == (1, 2, False)


def test_only_what_was_run_has_a_verdict() -> None:
    assert verdicts([]) == []
    assert [one.what for one in verdicts([one for one in ALL if one.variant == "fast"])] == [
        BARS[3].what,
        BARS[4].what,
    ]


def test_a_verdict_is_a_line() -> None:
    assert Verdict("it is good", 5, 5, ()).line() == "met     5 of 5  it is good"
    assert Verdict("it is good", 3, 5, ("a", "b")).line() == "MISSED  3 of 5  it is good: a (and 1 more)"


def test_the_table_has_a_row_for_each_thread() -> None:
    never = [job(n, response_ms=300) for n in range(40)]
    one = run(thread([2] * 12, good_after(5)), thread([2] * 12, never))
    rows = report.show([one], [tuple(summary(one, held) for held in one.threads)]).splitlines()
    assert len(rows) == 3
    assert "7 in 20" in rows[1]
    assert "never" in rows[2]


def test_a_page_is_renewed_between_its_marks() -> None:
    page = f"above {report.BEGIN} old {report.END} below"
    assert report.between_marks(page, "new") == f"above {report.BEGIN}new{report.END} below"
    with pytest.raises(ValueError, match="has no"):
        report.between_marks(f"above {report.END} {report.BEGIN}", "new")


def test_a_thread_that_was_held_back_says_why_in_the_results() -> None:
    one = replace(thread([2] * 12, good_after(5)), reason="waits for bandwidth")
    assert b"waits for bandwidth" in msgspec.json.encode(run(one))
