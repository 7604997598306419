"""The table of held threads and the rules behind it, as the extension has them (ext/held_cdef.h). It decides nothing.

A row is read and written through `HeldTable.row`, whose fields are the C structure's: times are nanoseconds.
"""

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from edgehold._kernel import ffi, lib

FAST: int = lib.EH_RULE_FAST
REFERENCE: int = lib.EH_RULE_REFERENCE
FIXED: int = lib.EH_RULE_FIXED
WINDOW_MAX: int = lib.EH_WINDOW_MAX
HELD: int = lib.EH_HELD
FROZEN: int = lib.EH_FROZEN
PHASE_SUSPECT: int = lib.EH_PHASE_SUSPECT
PHASE_BEGIN: int = lib.EH_PHASE_BEGIN
PLACE_SHORT: int = lib.EH_PLACE_SHORT
CHANGE: int = lib.EH_TODO_CHANGE
GONE: int = lib.EH_TODO_GONE
TAKEN: int = lib.EH_TODO_TAKEN
LOOK: int = lib.EH_TODO_LOOK
ERROR: int = lib.EH_TODO_ERROR

# struct eh_sample and struct eh_todo; their sizes are asserted in ext/held.c.
_SAMPLE = struct.Struct("=QQQQQQQQiIII")
_TODO = struct.Struct("=iIiI")
_FIRST_ROWS = 64


class RawRule(NamedTuple):
    """struct eh_rule. Times in nanoseconds; 0 < floor <= cap <= period."""

    period_ns: int
    floor_ns: int
    cap_ns: int
    overallocation: float
    window: int
    kind: int


class RawSample(NamedTuple):
    """struct eh_sample. Times in nanoseconds; executed and waited are of the whole window."""

    time_ns: int
    elapsed_ns: int
    executed_ns: int
    run_delay_ns: int
    budget_ns: int
    wanted_ns: int
    period_ns: int
    multiplier: int
    tid: int
    owner: int
    saturated: int
    reserved: int


class RawTodo(NamedTuple):
    """struct eh_todo: a row, what is to be done (`CHANGE` and the like, or-ed), and the errno of `ERROR`."""

    row: int
    what: int
    error: int
    reserved: int


def set_rule(raw: Any, rule: RawRule) -> None:
    """Fill in a struct eh_rule."""
    raw.period_ns, raw.floor_ns, raw.cap_ns, raw.overallocation, raw.window, raw.kind = rule


class Sizing:
    """One rule with its state, apart from the table: for groups and for replaying."""

    def __init__(self, rule: RawRule, budget_ns: int) -> None:
        self._rule = ffi.new("struct eh_rule *")
        set_rule(self._rule, rule)
        self._window = ffi.new("struct eh_window *")
        self.state: Any = ffi.new("struct eh_sizing *")
        """struct eh_sizing."""
        lib.eh_rule_begin(self.state, budget_ns)

    def step(
        self, *, elapsed_ns: int, executed_ns: int, run_delay_ns: int, budget_ns: int, throttled: int, saturated: int
    ) -> bool:
        """One window; -1 where ``throttled`` or ``saturated`` is not known. Whether the next should be a short one."""
        window = self._window
        window.elapsed_ns, window.executed_ns, window.run_delay_ns = elapsed_ns, executed_ns, run_delay_ns
        window.budget_ns, window.throttled, window.saturated = budget_ns, throttled, saturated
        return bool(lib.eh_rule_step(self._rule, self.state, window))

    def change(self, rule: RawRule) -> None:
        """Go on under another rule; what was learned stays, in proportion to the period."""
        before = ffi.new("struct eh_rule *", self._rule[0])
        set_rule(self._rule, rule)
        lib.eh_rule_rescale(self.state, before, self._rule)


class HeldTable:
    """The rows, the history and the buffers of a pass. Grows, never shrinks."""

    def __init__(self, *, history: int, cycle_ns: int, short_ns: int) -> None:
        self._size = 0
        self._used = 0
        """Rows beyond were never used: a pass leaves them out."""
        self._free: list[int] = []
        self._rows: Any = ffi.NULL
        self._todo: Any = ffi.NULL
        # Not cleared: pages that no sample was written to take no memory.
        self._samples = ffi.new_allocator(should_clear_after_alloc=False)("struct eh_sample[]", history)
        self._pass = ffi.new("struct eh_pass *")
        self._pass.history = self._samples
        self._pass.history_size = history
        self._pass.cycle_ns, self._pass.short_ns = cycle_ns, short_ns
        self._index: Any = ffi.NULL
        self._grow()

    def __len__(self) -> int:
        return self._used - len(self._free)

    def _grow(self) -> None:
        size = max(2 * self._size, _FIRST_ROWS)
        rows = ffi.new("struct eh_held[]", size)
        if self._size:
            ffi.memmove(rows, self._rows, self._size * ffi.sizeof("struct eh_held"))
        self._rows, self._size = rows, size
        self._todo = ffi.new("struct eh_todo[]", size)

    def add(self, *, tid: int, fd: int, owner: int, start_ticks: int, rule: RawRule, budget_ns: int) -> int:
        """A row for a thread, whose rule begins with this budget. Returns its number."""
        if not self._free and self._used == self._size:
            self._grow()
        number = self._free.pop() if self._free else self._used
        self._used = max(self._used, number + 1)
        row = self._rows[number]
        ffi.memmove(ffi.addressof(row), ffi.new("struct eh_held *"), ffi.sizeof("struct eh_held"))
        row.fd, row.owner, row.start_ticks = fd, owner, start_ticks
        set_rule(row.rule, rule)
        lib.eh_rule_begin(ffi.addressof(row.sizing), budget_ns)
        row.told_ns = budget_ns
        row.tid = tid
        return number

    def remove(self, number: int) -> None:
        """The row is free."""
        self._rows[number].tid = 0
        self._free.append(number)

    def row(self, number: int) -> Any:
        """struct eh_held of ext/held_cdef.h; not to be kept beyond the next `add`."""
        return self._rows[number]

    def change_rule(self, number: int, rule: RawRule) -> None:
        """Go on under another rule; what was learned stays, in proportion to the period."""
        row = self._rows[number]
        before = ffi.new("struct eh_rule *", row.rule)
        if rule.kind != before.kind:
            row.due_ns, row.place = 0, lib.EH_PLACE_CYCLE  # a window of its own is the fast rule's alone
        elif row.due_ns:
            row.due_ns = max(row.due_ns, row.base_ns + rule.period_ns)  # no window is shorter than its period
        set_rule(row.rule, rule)
        lib.eh_rule_rescale(ffi.addressof(row.sizing), before, ffi.addressof(row.rule))

    def run(self, *, grid: bool, tasks: Any = None, task_count: int = 0, tasks_ns: int = 0) -> list[RawTodo]:
        """One pass: every row (``grid``), or only short windows that are over. ``tasks``: the iterator's records."""
        one = self._pass
        one.grid = grid
        one.tasks = ffi.NULL if tasks is None else tasks
        one.task_count, one.tasks_ns = task_count, tasks_ns
        if one.index_size < 2 * task_count or one.index == ffi.NULL:
            one.index_size = 1 << max(2 * task_count, 64).bit_length()
            self._index = ffi.new("int32_t[]", one.index_size)
            one.index = self._index
        count = lib.eh_pass(self._rows, self._used, one, self._todo)
        if not count:
            return []
        return [RawTodo(*raw) for raw in _TODO.iter_unpack(ffi.buffer(self._todo, count * _TODO.size))]

    @property
    def next_due_ns(self) -> int:
        """When the first short window ends (CLOCK_MONOTONIC); 0: there is none."""
        return int(self._pass.next_due_ns)

    def expect(self, due_ns: int) -> None:
        """A row that was filled in by hand has a short window that ends then."""
        if not self._pass.next_due_ns or due_ns < self._pass.next_due_ns:
            self._pass.next_due_ns = due_ns

    def history(self, owner: int, *, tid: int = 0, most: int) -> Iterator[RawSample]:
        """The last samples of an owner, or of one of his threads, oldest first."""
        most = min(most, self._pass.history_size)
        out = ffi.new("struct eh_sample[]", max(most, 1))
        count = lib.eh_history(self._pass, owner, tid, out, most)
        for raw in _SAMPLE.iter_unpack(bytes(ffi.buffer(out, count * _SAMPLE.size))):
            yield RawSample(*raw)

    def remember(self, sample: RawSample) -> None:
        """Add a sample that the table did not make: a group's."""
        at = self._pass.history_written % self._pass.history_size
        ffi.buffer(self._samples, self._pass.history_size * _SAMPLE.size)[
            at * _SAMPLE.size : (at + 1) * _SAMPLE.size
        ] = _SAMPLE.pack(*sample)
        self._pass.history_written += 1
