"""The table of held threads: its rows, its history, and one pass over it. The rows are of this process' own threads, as
watched ones (nothing is changed about them), or of threads that nobody has, whose records are written by hand."""

import errno
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deadlined.rules import RuleConfig
from edgehold.api.deadlined import Rule
from edgehold.kernel import procfs
from edgehold.kernel.native_bpf import TaskRecords
from edgehold.kernel.native_held import (
    CHANGE,
    ERROR,
    FROZEN,
    GONE,
    HELD,
    LOOK,
    PHASE_SUSPECT,
    TAKEN,
    HeldTable,
    RawSample,
    RawTodo,
)

MS = 1_000_000
S = 1_000 * MS
# Above every pid_max (2^22): nobody's threads.
NOBODY = 2**30
RULE = RuleConfig(
    period_ns=100 * MS, initial_budget_ns=10 * MS, overallocation=0.1, window=5, cap=0.8, min_budget_ns=MS
)
ROWS_AT_FIRST = 64


def new_table(**more: int) -> HeldTable:
    return HeldTable(**({"history": 8, "cycle_ns": 500 * MS, "short_ns": 100 * MS} | more))


def add(table: HeldTable, number: int = 0, **more: Any) -> int:
    """A row of a thread that nobody has, as if its window had begun at one second."""
    ordinary: dict[str, Any] = {"fd": -1, "owner": 7, "start_ticks": 5, "rule": RULE.raw(), "budget_ns": 10 * MS}
    row = table.add(tid=NOBODY + number, **(ordinary | more))
    cells = table.row(row)
    cells.flags, cells.budget_ns = HELD, 10 * MS
    cells.base_ns = cells.progress_ns = S
    cells.check_ns = 2**63
    return row


class Records:
    """What the iterator over deadline threads would have read."""

    def __init__(self, table: HeldTable) -> None:
        self._table = table
        self._records = TaskRecords(600)
        self._count = 0

    def put(self, number: int = 0, **fields: int) -> None:
        """One more thread."""
        one = self._records.pointer[self._count]
        values = {"tid": NOBODY + number, "start_boottime_ns": 50 * MS, "dl_runtime_ns": MS, "state": 1}
        values |= {"period_ns": 100 * MS, **fields}
        for name in ("executed_ns", "run_delay_ns", "throttled"):
            setattr(one, name, values.pop(name, 0))
        for name, value in values.items():
            setattr(one, name, value)
        self._count += 1

    def run(self, at_ns: int) -> dict[int, RawTodo]:
        """A pass whose reading began then; what is to be done, by row. The records are used up."""
        count, self._count = self._count, 0
        todo = self._table.run(grid=True, tasks=self._records.pointer, task_count=count, tasks_ns=at_ns)
        return {one.row: one for one in todo}


@pytest.fixture
def table() -> HeldTable:
    return new_table()


@pytest.fixture
def records(table: HeldTable) -> Records:
    return Records(table)


@pytest.fixture
def ended() -> Iterator[int]:
    """The schedstat of a thread that has ended."""
    opened = threading.Event()
    thread = threading.Thread(target=opened.wait)
    thread.start()
    fd = procfs.open_thread(thread.native_id or 0, "schedstat")
    opened.set()
    thread.join()
    deadline = time.monotonic() + 20
    while Path(f"/proc/self/task/{thread.native_id}").exists() and time.monotonic() < deadline:
        os.sched_yield()  # it is joined a moment before it is gone
    yield fd
    os.close(fd)


def test_rows_are_used_again_and_begin_empty(table: HeldTable) -> None:
    rows = [add(table, number) for number in range(5)]
    assert rows == [0, 1, 2, 3, 4]
    assert len(table) == 5
    table.row(3).due_ns = 99
    table.remove(3)
    table.remove(1)
    assert len(table) == 3
    again = {table.add(tid=NOBODY, fd=3, owner=1, start_ticks=2, rule=RULE.raw(), budget_ns=5) for _ in range(2)}
    assert again == {1, 3}
    cells = table.row(3)
    assert (cells.due_ns, cells.flags, cells.base_ns, cells.budget_ns, cells.sizing.wanted_ns) == (0, 0, 0, 0, 5)
    assert (cells.tid, cells.fd, cells.owner, cells.start_ticks) == (NOBODY, 3, 1, 2)


def test_it_grows_and_keeps_what_it_has(table: HeldTable) -> None:
    for number in range(5 * ROWS_AT_FIRST):
        row = add(table, number)
        table.row(row).sizing.wanted_ns = number
    assert len(table) == 5 * ROWS_AT_FIRST
    assert [table.row(row).sizing.wanted_ns for row in range(len(table))] == list(range(len(table)))
    assert {table.row(row).tid - NOBODY for row in range(len(table))} == set(range(len(table)))


def test_a_pass_over_many_finds_each_by_its_record(table: HeldTable, records: Records) -> None:
    rows = {number: add(table, number) for number in range(500)}
    for number in reversed(range(500)):
        records.put(number, executed_ns=number * MS)
    records.run(S + 500 * MS)
    assert [table.row(rows[number]).executed_ns for number in range(500)] == [number * MS // 5 for number in range(500)]


def test_the_rule_is_told_once(table: HeldTable, records: Records) -> None:
    row = add(table)
    records.put(executed_ns=100 * MS)
    assert records.run(S + 500 * MS)[row].what == CHANGE
    assert table.row(row).sizing.wanted_ns == 22 * MS
    records.put(executed_ns=200 * MS)
    assert records.run(2 * S) == {}


def test_a_window_that_is_too_short_says_nothing_and_goes_on(table: HeldTable, records: Records) -> None:
    row = add(table)
    records.put(executed_ns=90 * MS)
    assert records.run(S + 249 * MS) == {}
    assert (table.row(row).windows, table.row(row).base_ns) == (0, S)
    records.put(executed_ns=90 * MS)
    assert records.run(S + 250 * MS)[row].what == CHANGE  # half a cycle
    assert (table.row(row).windows, table.row(row).executed_ns) == (1, 36 * MS)


def test_no_window_is_shorter_than_its_period(table: HeldTable, records: Records) -> None:
    row = add(table, rule=replace(RULE, period_ns=2 * S).raw())
    for at_ns, windows in ((S + 500 * MS, 0), (3 * S - 1, 0), (3 * S, 1)):
        records.put(period_ns=2 * S)
        records.run(at_ns)
        assert table.row(row).windows == windows


def test_a_saturated_thread_has_a_short_window_next(table: HeldTable, records: Records) -> None:
    row = add(table)
    records.put(executed_ns=50 * MS, run_delay_ns=450 * MS, state=0, dl_runtime_ns=0)
    assert records.run(S + 500 * MS)[row].what == CHANGE
    cells = table.row(row)
    assert (cells.sizing.wanted_ns, cells.sizing.saturated) == (80 * MS, 1)
    assert cells.due_ns == table.next_due_ns == S + 600 * MS
    # Without short windows there is none.
    other = new_table(short_ns=0)
    row = add(other)
    alone = Records(other)
    alone.put(executed_ns=50 * MS, run_delay_ns=450 * MS, state=0, dl_runtime_ns=0)
    alone.run(S + 500 * MS)
    assert (other.row(row).due_ns, other.next_due_ns) == (0, 0)


def test_a_thread_is_sized_by_whole_periods_after_its_short_windows(table: HeldTable, records: Records) -> None:
    """The rest between a short window and the next cycle is no multiple of anything: nobody is sized by it."""
    row = add(table)
    history = []
    for at_ms, executed_ms, waited_ms in (
        (500, 50, 450),  # a cycle: saturated
        (700, 150, 450),  # its short window, which ends late: it slept
        (1000, 220, 450),  # a cycle in the middle of its own window
        (1200, 200, 450),  # its own window: 10 ms in each 100
        (1500, 290, 450),  # where its first one with the cycle begins
        (2000, 345, 450),  # 11 ms
    ):
        records.put(executed_ns=executed_ms * MS, run_delay_ns=waited_ms * MS)
        records.run(S + at_ms * MS)
        history.append((table.row(row).windows, table.row(row).sizing.wanted_ns // MS))
    assert history == [(1, 80), (2, 80), (2, 80), (3, 11), (3, 11), (4, 12)]
    assert [one.elapsed_ns // MS for one in table.history(7, most=9)] == [500, 200, 500, 500]
    assert table.next_due_ns == 0


def test_a_longer_period_moves_the_end_of_a_short_window(table: HeldTable, records: Records) -> None:
    """Or the caller, who is told of a time that is past, would come again and again until the period is over."""
    row = add(table)
    table.row(row).due_ns = S + 100 * MS
    table.change_rule(row, replace(RULE, period_ns=2 * S).raw())
    records.put(executed_ns=MS, period_ns=2 * S)
    records.run(S + 100 * MS)
    assert table.next_due_ns == 3 * S


def test_another_rule_has_no_short_windows(table: HeldTable) -> None:
    row = add(table)
    table.row(row).due_ns = S + 100 * MS
    table.change_rule(row, RULE.raw())
    assert table.row(row).due_ns == S + 100 * MS
    table.change_rule(row, replace(RULE, rule=Rule.REFERENCE).raw())
    assert table.row(row).due_ns == 0


def test_a_suspended_guest_is_not_sized_and_wakes_nobody(table: HeldTable, records: Records) -> None:
    row = add(table)
    cells = table.row(row)
    cells.flags |= FROZEN
    cells.due_ns = S + 100 * MS
    records.put(executed_ns=0)
    assert records.run(2 * S) == {}
    assert (cells.sizing.wanted_ns, cells.windows, table.next_due_ns) == (10 * MS, 0, 0)
    cells.flags &= ~FROZEN
    records.put(executed_ns=MS)
    assert records.run(3 * S) == {}  # where its first window begins
    records.put(executed_ns=MS + 100 * MS)
    assert records.run(3 * S + 500 * MS)[row].what == CHANGE
    assert cells.sizing.wanted_ns == 22 * MS


def test_who_has_ended_is_told_by_a_record_too(table: HeldTable, records: Records) -> None:
    """A process whose parent has not looked yet keeps its policy: only its state says that it is over."""
    row = add(table)
    records.put(state=0x80)
    assert records.run(2 * S)[row].what == GONE


def test_who_is_in_a_reservation_of_another_period_is_not_ours(table: HeldTable, records: Records) -> None:
    row = add(table)
    records.put(period_ns=99 * MS)
    assert records.run(2 * S)[row].what == TAKEN


def test_another_thread_of_the_same_id_is_not_taken_for_it(table: HeldTable, records: Records, ended: int) -> None:
    row = add(table, fd=ended, start_ticks=6)  # the record's began at 5
    records.put(executed_ns=100 * MS)
    assert records.run(2 * S)[row].what == GONE
    assert table.row(row).windows == 0


def test_who_has_no_record_is_read_by_his_file(table: HeldTable, records: Records, ended: int) -> None:
    here = procfs.open_thread(threading.get_native_id(), "schedstat")
    try:
        gone, alive = add(table, 1, fd=ended), add(table, 2, fd=here)
        records.put(3)  # somebody else's
        found = records.run(2 * S)
        assert found[gone].what == GONE
        assert not found.get(alive, RawTodo(alive, 0, 0, 0)).what & (GONE | ERROR)
        assert table.row(alive).executed_total_ns > 0
    finally:
        os.close(here)


def test_records_that_make_no_sense_harm_nobody(table: HeldTable, records: Records) -> None:
    row = add(table)
    table.row(row).base_executed_ns = 10 * MS
    for tid in (-1, 0, -NOBODY, 2**31 - 1):
        records.put(tid - NOBODY)
    for _ in range(3):  # the same id three times, with counters that went back
        records.put(executed_ns=MS, run_delay_ns=2**64 - 1, dl_runtime_ns=-(2**63), state=2**32 - 0x40)
    records.run(2 * S)
    assert MS <= table.row(row).sizing.wanted_ns <= 80 * MS
    assert records.run(3 * S)[row].what & ERROR  # no record, and its file is none


def test_a_minute_and_four_seconds_do_not_overflow(records: Records, table: HeldTable) -> None:
    row = add(table, rule=replace(RULE, period_ns=4 * S, initial_budget_ns=2 * S, min_budget_ns=S).raw())
    records.put(executed_ns=30 * S, run_delay_ns=30 * S, period_ns=4 * S)
    records.run(61 * S)
    assert (table.row(row).executed_ns, table.row(row).run_delay_ns) == (2 * S, 2 * S)


def test_who_wants_to_run_and_does_not_is_looked_at(table: HeldTable, records: Records) -> None:
    row = add(table)
    records.put(state=0)
    assert not records.run(S + 200 * MS)  # two periods are nothing yet
    for number in (1, 2):
        records.put(state=0)
        assert records.run(S + number * 201 * MS)[row].what & LOOK
    records.put(state=1)  # asleep
    assert not records.run(4 * S).get(row, RawTodo(0, 0, 0, 0)).what & LOOK
    table.row(row).flags = 0
    records.put(state=0)  # one that is only watched is nobody's fault
    table.row(row).fd = -1
    assert not records.run(5 * S)[row].what & LOOK


def test_a_file_that_can_t_be_read_is_an_error_of_its_row_alone(table: HeldTable, tmp_path: Path) -> None:
    for text in ("", "12", "12 ", "12 34", "12 34 ", "-1 2 3", "a b c", "\0" * 20):
        (tmp_path / "odd").write_text(text)
        fd = os.open(tmp_path / "odd", os.O_RDONLY)
        row = add(table, fd=fd)
        assert [(one.row, one.what, one.error) for one in table.run(grid=True)] == [(row, ERROR, errno.EPROTO)]
        table.remove(row)
        os.close(fd)
    row = add(table, fd=-1)
    assert [(one.what, one.error) for one in table.run(grid=True)] == [(ERROR, errno.EBADF)]


def test_only_windows_that_are_due_are_judged_between_two_cycles(table: HeldTable, tmp_path: Path) -> None:
    (tmp_path / "schedstat").write_text("1000000 0 1\n")
    fd = os.open(tmp_path / "schedstat", os.O_RDONLY)
    now = time.monotonic_ns()
    due, later, never = (add(table, number, fd=fd) for number in range(3))
    for row, due_ns in ((due, now), (later, now + 3600 * S), (never, 0)):
        cells = table.row(row)
        cells.base_ns = cells.progress_ns = now - S
        cells.sizing.phase = PHASE_SUSPECT
        cells.due_ns = due_ns
    table.expect(now + 3600 * S)
    table.expect(now)
    table.expect(now + 5)
    assert table.next_due_ns == now
    table.run(grid=False)
    assert [table.row(row).windows for row in (due, later, never)] == [1, 0, 0]
    assert table.next_due_ns == now + 3600 * S
    os.close(fd)


def test_a_watched_thread_is_measured_and_left_alone(table: HeldTable) -> None:
    """A real one, of this process: not in SCHED_DEADLINE, so nothing limits it and nothing is said of its policy."""
    fd = procfs.open_thread(threading.get_native_id(), "schedstat")
    before = os.sched_getscheduler(0)
    row = table.add(
        tid=threading.get_native_id(), fd=fd, owner=1, start_ticks=0,
        rule=replace(RULE, period_ns=MS // 10, initial_budget_ns=2000, min_budget_ns=1024).raw(), budget_ns=2000,
    )  # fmt: skip
    try:
        table.run(grid=True)
        cells = table.row(row)
        assert (cells.windows, cells.flags) == (0, 0)
        cells.base_ns -= S
        executed = cells.executed_total_ns
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and cells.executed_total_ns == executed:
            table.run(grid=True)
        assert cells.windows >= 1
        assert cells.executed_total_ns > executed
        assert not cells.sizing.saturated
        assert next(iter(table.history(1, most=1))).tid == threading.get_native_id()
    finally:
        os.close(fd)
    assert os.sched_getscheduler(0) == before


def test_the_history_is_a_ring_and_everybody_sees_his_own(table: HeldTable, records: Records) -> None:
    for number, owner in ((1, 7), (2, 8)):
        add(table, number, owner=owner)
    for window in range(1, 8):
        for number in (1, 2):
            records.put(number, executed_ns=window * 10 * MS)
        records.run(S + window * 500 * MS)
    kept = list(table.history(7, most=100))
    assert [one.time_ns for one in kept] == [S + window * 500 * MS for window in (4, 5, 6, 7)]
    assert {one.tid for one in kept} == {NOBODY + 1}
    assert {(one.elapsed_ns, one.executed_ns, one.budget_ns) for one in kept} == {(500 * MS, 10 * MS, 10 * MS)}
    assert list(table.history(8, tid=NOBODY + 2, most=2)) == list(table.history(8, most=100))[-2:]
    for none in (table.history(9, most=5), table.history(7, tid=1, most=5), table.history(7, most=0)):
        assert list(none) == []


def test_a_group_s_samples_are_in_the_same_ring(table: HeldTable) -> None:
    made = [
        RawSample(
            time_ns=number, elapsed_ns=2, executed_ns=3, run_delay_ns=4, budget_ns=5, wanted_ns=6, period_ns=7,
            multiplier=8, tid=0, owner=9, saturated=1, reserved=0,
        )
        for number in range(20)
    ]  # fmt: skip
    for one in made:
        table.remember(one)
    assert list(table.history(9, most=100)) == made[-8:]
    assert list(table.history(9, most=3)) == made[-3:]
    assert list(new_table().history(9, most=3)) == []


def test_a_pass_over_nothing(table: HeldTable, records: Records) -> None:
    assert table.run(grid=True) == []
    assert table.run(grid=False) == []
    assert records.run(S) == {}
    row = add(table)
    table.remove(row)
    assert table.run(grid=True) == []
