"""How much CPU everything else on the host used meanwhile: a measurement that strangers disturbed says nothing."""

import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
# proc(5), /proc/stat: user nice system idle iowait irq softirq steal; guest time is in user. What a hypervisor below
# took (steal) is a stranger's too.
_BUSY = (0, 1, 2, 5, 6, 7)


@dataclass(frozen=True, slots=True)
class Usage:
    """CPU seconds so far."""

    at_s: float
    busy_s: float
    own_s: float


def usage(pids: Collection[int]) -> Usage:
    """Of the host, and of some processes with this one. They must live until the second look."""
    cells = Path("/proc/stat").read_text().partition("\n")[0].split()[1:]
    busy = sum(int(cells[n]) for n in _BUSY) / _TICKS
    return Usage(time.monotonic(), busy, sum(_of(pid) for pid in {*pids, os.getpid()}))


def between(before: Usage, after: Usage) -> float:
    """What strangers used on average, in CPUs. The kernel counts the host's time in ticks: good to some hundredths."""
    spent = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return max(spent / (after.at_s - before.at_s), 0.0)


def _of(pid: int) -> float:
    # The name may have spaces and brackets; utime and stime are the 12th and 13th behind it.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS
