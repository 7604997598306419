"""How much SCHED_DEADLINE bandwidth the kernel would still admit. No file tells; only asking for it does.

One thread may take at most one CPU, so a thread for each CPU asks for as much as it gets, one after the other, and all
give it back. Each sets and unsets *itself*: a running thread leaves SCHED_DEADLINE without a leak of bandwidth, a
sleeping one would leave its share behind. The whole of the bandwidth is held for some milliseconds, in a process that
may be killed at any time without harm; a daemon therefore uses `probe_in_child`.

``python -m edgehold.kernel.capacity [--json]``
"""

import argparse
import asyncio
import errno
import json
import os
import sys
import threading
from dataclasses import asdict, dataclass

from edgehold.errors import DeniedError, EdgeholdError, FailedError
from edgehold.kernel import limits, native, procfs, sched
from edgehold.kernel.sched import Policy, SchedAttr

# A long period keeps the smallest share (RESOLUTION x 1 s = 0.5 ms) above what the search itself executes, so that no
# prober is throttled while it holds bandwidth.
_PERIOD_NS = 1_000_000_000
RESOLUTION = 1 / 2048
_CHILD_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Admission bandwidth in CPUs: 1.0 is one whole CPU."""

    cpus: int
    available: float
    resolution: float


class _Prober(threading.Thread):
    """Takes as much as one thread can get when told so, and leaves by itself when told so."""

    def __init__(self) -> None:
        super().__init__(name="capacity", daemon=True)
        self.begin = threading.Event()
        self.asked = threading.Event()
        self.leave = threading.Event()
        self.unneeded = False
        self.share = 0.0
        self.error: OSError | None = None

    def run(self) -> None:
        before = sched.get()
        self.begin.wait()
        if self.unneeded:
            return
        try:
            self.share = _take()
        except OSError as error:
            self.error = error
        finally:
            self.asked.set()
            self.leave.wait()
            if sched.get().policy is Policy.DEADLINE:
                _give_back(before)


def _give_back(before: SchedAttr) -> None:
    """Leave SCHED_DEADLINE so that the whole share is free at once.

    Raising did not refill the budget, so a plain change of policy would give the share back up to a period later. A
    decrease counts at once, but a thread that sleeps with the smallest reservation wakes up throttled for four
    seconds, and between two calls from Python it sleeps until it has the interpreter again: so both in one call.
    """
    stat_fd = procfs.open_thread(threading.get_native_id(), "stat")
    smallest = sched.to_raw(sched.SMALLEST)
    try:
        native.sched_leave(
            0, stat_fd, if_asleep=smallest, if_running=smallest, wanted=sched.to_raw(sched.without_slice(before))
        )
    finally:
        os.close(stat_fd)


def _take() -> float:
    """Raise the calling thread's reservation as far as it goes: no step gives any back, so none is in flight."""
    steps = round(1 / RESOLUTION)
    low, high = 0, steps + 1  # low is held, high was refused (steps + 1 is refused by definition)
    ask = steps  # mostly a whole CPU is free
    while low + 1 < high:
        attr = SchedAttr.deadline(
            runtime_ns=max(ask * _PERIOD_NS // steps, limits.DL_MIN_RUNTIME_NS), period_ns=_PERIOD_NS
        )
        try:
            sched.set_attr(0, attr)
            low = ask
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            high = ask
        ask = (low + high) // 2
    return low / steps


def probe() -> Found:
    """Ask the kernel. Blocks for some milliseconds, in which nobody else on the host gets a reservation.

    Raises:
        DeniedError: no CAP_SYS_NICE, or this process' cpuset does not cover its root domain.
    """
    cpus = os.cpu_count() or 1
    probers = [_Prober() for _ in range(cpus)]
    for prober in probers:
        prober.start()
    available = 0.0
    try:
        for prober in probers:
            prober.begin.set()
            prober.asked.wait()
            if prober.error is not None:
                attr = SchedAttr.deadline(runtime_ns=_PERIOD_NS, period_ns=_PERIOD_NS)
                raise sched.explain(prober.error, prober.native_id or 0, attr)
            available += prober.share
            if prober.share == 0:
                break
    finally:
        for prober in probers:
            prober.unneeded = not prober.begin.is_set()
            prober.leave.set()
            prober.begin.set()
        for prober in probers:
            prober.join()
    return Found(cpus=cpus, available=available, resolution=RESOLUTION)


async def probe_in_child() -> Found:
    """The same in a process of its own, so that no thread of the caller ever holds the host's bandwidth.

    Raises:
        EdgeholdError: as `probe`, or the child could not be run.
    """
    try:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "edgehold.kernel.capacity", "--json",
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
    except OSError as error:  # no process, no memory, no descriptor
        raise FailedError(f"the capacity probe could not be started: {error}", retryable=True) from error
    try:
        async with asyncio.timeout(_CHILD_TIMEOUT_S):
            out, err = await child.communicate()
    except TimeoutError:
        raise FailedError(f"the capacity probe did not end within {_CHILD_TIMEOUT_S:g} s") from None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode == DeniedError.exit_status:
        raise DeniedError(err.decode(errors="replace").strip())
    if child.returncode != 0:
        raise FailedError(f"the capacity probe failed: {err.decode(errors='replace').strip()[-300:]}")
    return Found(**json.loads(out))


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m edgehold.kernel.capacity", description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    try:
        found = probe()
    except EdgeholdError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    if arguments.json:
        sys.stdout.write(json.dumps(asdict(found)) + "\n")
    else:
        sys.stdout.write(f"{found.available:.4f} of {found.cpus} CPUs (steps of {found.resolution:.4f})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
