"""Periods of real threads: right where they get enough CPU, never wrong, and nothing left behind."""

import asyncio
import contextlib
import errno
import os
import re
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deadlined.observer import Observer
from deadlined.periods import Inference
from edgehold.clock import SystemClock
from edgehold.errors import NoCapacityError
from edgehold.kernel import sched
from edgehold.kernel.procfs import GoneError
from edgehold.kernel.sched import SchedAttr
from edgehold.kernel.switches import LOST, OUT, PREEMPTED, Activations, SwitchRecorder
from edgehold.testing.capability import need_root
from edgehold.testing.load import Load, eventually
from edgehold.testing.patterns import Patterns

MS = 1_000_000
NOBODY = 2**30

deadline = pytest.mark.usefixtures("deadline")


def perf_events() -> int:
    """How many recordings this process has open."""
    return sum("perf_event" in str(link) for link in descriptors())


def descriptors() -> list[Path]:
    """What this process has open."""
    found = []
    for one in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # that of the look itself
            found.append(one.readlink())
    return found


@pytest.fixture(autouse=True)
def all_closed() -> Iterator[None]:
    before = len(descriptors())
    yield
    assert perf_events() == 0
    assert len(descriptors()) == before


@pytest.fixture
def observer() -> Observer:
    return Observer(clock=SystemClock())


def hold(pid: int, *, budget_ms: float) -> None:
    """A budget every 100 ms; what a test before gave up is free only after a period."""

    def held() -> bool:
        try:
            sched.set_attr(pid, SchedAttr.deadline(runtime_ns=round(budget_ms * MS), period_ns=100 * MS))
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            raise
        return True

    eventually(held, timeout_s=20, what=f"{budget_ms} ms for process {pid} fit in")


async def told(observer: Observer, pid: int, *, timeout_s: float = 60) -> Inference:
    """The first answer: on a busy machine a look may show none."""
    end = time.monotonic() + timeout_s
    while (found := await observer.observe(pid)).period_ns is None:
        assert time.monotonic() < end, found
    return found


@deadline
async def test_periods_of_threads_that_have_enough(observer: Observer) -> None:
    periods = {10: 1.0, 100 / 3: 2.0, 40: 2.0, 100: 4.0}
    lines = [f"periodic {period_ms / 1000} {work_ms / 1000}" for period_ms, work_ms in periods.items()]
    with Patterns(lines) as patterns:
        for pid, (period_ms, work_ms) in zip(patterns.pids, periods.items(), strict=True):
            hold(pid, budget_ms=2 * work_ms * 100 / period_ms)
        answers = await asyncio.gather(*(told(observer, pid) for pid in patterns.pids))
    for period_ms, found in zip(periods, answers, strict=True):
        assert found.period_ns == pytest.approx(period_ms * MS, rel=0.01)
        assert 0.7 < found.confidence <= 1
        assert not found.reason


@deadline
async def test_one_that_uses_its_budget_up_now_and_then_still_shows_its_own(observer: Observer) -> None:
    # 2 or 3 jobs of 4 ms fall into one period of the reservation, which has room for less than 3.
    with Patterns(["periodic 0.04 0.004"]) as patterns:
        hold(patterns.pids[0], budget_ms=11.4)
        found = await told(observer, patterns.pids[0])
    assert found.period_ns == pytest.approx(40 * MS, rel=0.01)


@deadline
async def test_aperiodic_ones_have_none(observer: Observer) -> None:
    lines = ["poisson 0.02 0.001", "uniform 0.03 0.001", "uniform 0.01 0.0005 0.6", "bursts 0.03 0.0005", "hog"]
    with Patterns(lines) as patterns:
        for pid in patterns.pids[:-1]:
            hold(pid, budget_ms=20)
        hold(patterns.pids[-1], budget_ms=5)
        for answer in await asyncio.gather(*(observer.observe(pid) for pid in patterns.pids)):
            assert answer.period_ns is None
            assert answer.confidence == 0
            assert answer.reason


@deadline
async def test_a_budget_that_is_used_up_does_not_show_the_reservation_s_period(observer: Observer) -> None:
    # What is throttled runs once each 100 ms; one that sleeps after its work even goes to sleep in that pace.
    lines = ["periodic 0.010 0.004", "periodic 0.0333 0.012", "periodic 0.040 0.016", "relative 0.020 0.002", "hog"]
    with Patterns(lines) as patterns:
        for pid in patterns.pids:
            hold(pid, budget_ms=4)
        for answer in await asyncio.gather(*(observer.observe(pid) for pid in patterns.pids)):
            assert answer.period_ns is None, answer


async def test_a_thread_that_ends_in_the_middle_is_gone(observer: Observer) -> None:
    with Patterns(["periodic 0.01 0.001"]) as patterns:
        task = asyncio.create_task(observer.observe(patterns.pids[0]))
        await asyncio.sleep(0.2)
    with pytest.raises(GoneError):
        await task
    with pytest.raises(GoneError):
        await observer.observe(NOBODY)


async def test_so_many_at_once_and_the_others_after_them(load: Load) -> None:
    observer = Observer(clock=SystemClock(), limit=1)
    pids = [load.sleeper().pid for _ in range(3)]
    tasks = [asyncio.create_task(observer.observe(pid)) for pid in pids]
    await asyncio.sleep(0.2)
    assert perf_events() == 1
    for task in tasks[:2]:  # one that is observed, one that waits
        task.cancel()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(one) for one in answers[:2]] == [asyncio.CancelledError] * 2
    assert isinstance(answers[2], Inference)
    assert "too seldom" in answers[2].reason


async def test_without_descriptors_it_says_so(observer: Observer) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(NoCapacityError, match="LimitNOFILE") as raised:
            await observer.observe(os.getpid())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert raised.value.retryable


def test_another_user_s_threads_need_a_privilege() -> None:
    need_root()
    code = (
        "import os, sys\n"
        "from edgehold.errors import DeniedError\n"
        "from edgehold.kernel.switches import SwitchRecorder\n"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "try: SwitchRecorder(int(sys.argv[1]))\n"
        "except DeniedError as error: print(error)\n"
    )
    argv = [sys.executable, "-c", code, str(os.getpid())]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "CAP_PERFMON" in done.stdout
    assert "perf_event_paranoid" in done.stdout


class Sleepy:
    """A thread of ours that sleeps so many times, once it may."""

    def __init__(self, times: int) -> None:
        self._go = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(times,))
        self._thread.start()
        self.tid = self._thread.native_id or 0

    def _run(self, times: int) -> None:
        self._go.wait()
        for _ in range(times):
            time.sleep(0.0001)

    def finish(self) -> None:
        self._go.set()
        self._thread.join()


def test_each_sleep_is_recorded_and_the_records_outlive_the_thread() -> None:
    sleepy = Sleepy(50)
    before = time.monotonic_ns()
    with SwitchRecorder(sleepy.tid) as recorder:
        sleepy.finish()
        switches = recorder.drain()
        assert recorder.drain() == []
        assert recorder.lost == 0
    times = [when for when, _flags in switches]
    assert before < times[0]
    assert times == sorted(times)
    assert times[-1] < time.monotonic_ns()
    slept = [when for when, flags in switches if flags & OUT and not flags & PREEMPTED]
    assert len(slept) >= 50
    seen = Activations()
    seen.feed(switches)
    assert 49 <= len(seen.times_ns) <= len(slept)


def test_what_did_not_fit_into_the_ring_is_told() -> None:
    sleepy = Sleepy(2000)
    with SwitchRecorder(sleepy.tid) as recorder:
        sleepy.finish()
        switches = recorder.drain()
        assert recorder.lost == 1  # though no later record says so
    assert switches[-1][1] == LOST
    assert 500 < len(switches) < 4000


def test_a_loss_in_the_middle_stands_where_it_happened() -> None:
    with Patterns(["relative 0.00005 0"]) as patterns, SwitchRecorder(patterns.pids[0]) as recorder:
        status = Path(f"/proc/{patterns.pids[0]}/status")

        def slept() -> int:
            return int(re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", status.read_text(), re.MULTILINE)[0])

        before = slept()
        eventually(lambda: slept() > before + 1200, timeout_s=60, what="more switches than the ring holds")
        assert recorder.drain()[-1][1] == LOST
        found: list[int] = []

        def more() -> bool:
            found.extend(flags for _when, flags in recorder.drain())
            return len(found) > 50

        eventually(more, timeout_s=20, what="it goes on after the loss")
        assert any(flags == OUT for flags in found)


def test_a_closed_recorder_is_closed() -> None:
    recorder = SwitchRecorder(os.getpid())
    recorder.close()
    recorder.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        recorder.drain()
