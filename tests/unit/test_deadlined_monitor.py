"""The monitor, the holder and the service where something is short: no descriptor, no disk, no patience. No policy is
changed here: entering is replaced, and what was never entered is never left."""

import asyncio
import errno
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from deadlined import reservation, watchdog
from deadlined import service as service_module
from deadlined.config import Settings
from deadlined.held import Attached, Thread
from deadlined.holder import Holder
from deadlined.journal import Journal
from deadlined.metrics import Metrics
from deadlined.monitor import Monitor
from deadlined.service import Service
from deadlined.watchdog import Verdict
from edgehold.api.deadlined import AttachRequest, Policy, Sample, Target, TargetKind, ThreadState
from edgehold.clock import SystemClock
from edgehold.errors import EdgeholdError, FailedError
from edgehold.kernel import capacity, procfs
from edgehold.kernel.procfs import ThreadStat
from edgehold.kernel.sampler import ThreadSample
from edgehold.kernel.sched import SchedAttr
from edgehold.service import Runtime

# Above every pid_max (2^22): nobody's threads.
TIDS = tuple(range(2**30, 2**30 + 128))
TARGET = Target(kind=TargetKind.PROCESS, id=TIDS[0])
EMPTY = OSError(errno.EMFILE, "Too many open files")


@dataclass
class Scripted:
    """A source that says what it is told to say."""

    wanted: tuple[int, ...] = TIDS
    error: OSError | None = None
    over: str = ""
    reason: str = ""
    closed: int = 0
    forgotten: list[int] = field(default_factory=list)

    def tids(self) -> tuple[int, ...]:
        if self.error is not None:
            raise self.error
        return self.wanted

    def forget(self, tid: int) -> None:
        self.forgotten.append(tid)

    def close(self) -> None:
        self.closed += 1


def facts(tid: int, state: str = "S") -> ThreadStat:
    return ThreadStat(tid, "x", state, False, 1)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    one = Journal(tmp_path / "state", boot_id="a")
    yield one
    one.close()


@pytest.fixture
def holder(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> Holder:
    monkeypatch.setattr(procfs, "stat", facts)
    return Holder(clock=SystemClock(), journal=journal, metrics=Metrics())


@pytest.fixture
def monitor(holder: Holder, monkeypatch: pytest.MonkeyPatch) -> Monitor:
    def enter(thread: Thread, _one: Attached) -> EdgeholdError | None:
        thread.try_at_ns, thread.state = None, ThreadState.HELD
        return None

    monkeypatch.setattr(holder, "enter", enter)
    return Monitor(clock=SystemClock(), holder=holder, metrics=Metrics(), cycle_ns=10**9, history=10, max_threads=1000)


def test_a_target_that_can_t_be_taken_in_whole_leaves_nothing_behind(
    monitor: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stat(tid: int) -> ThreadStat:
        if tid == TIDS[5]:
            raise EMPTY
        return facts(tid)

    monkeypatch.setattr(procfs, "stat", stat)
    source = Scripted()
    with pytest.raises(OSError, match="Too many open files"):
        monitor.adopt(1, TARGET, Policy(), source)
    assert monitor.attachments == {}
    assert [tid for tid in TIDS if monitor.owner(tid)] == []
    assert source.closed == 0  # still the caller's


def test_no_descriptor_is_a_reason_to_wait(monitor: Monitor) -> None:
    source = Scripted()
    one, _ = monitor.adopt(1, TARGET, Policy(), source)
    source.error = EMPTY
    monitor.cycle()
    assert "no file descriptor" in one.message().reason
    assert len(one.threads) == len(TIDS)
    source.error = None
    monitor.cycle()
    assert one.message().reason == ""
    source.error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(OSError, match="Input"):
        monitor.cycle()


def held(monitor: Monitor) -> tuple[Thread, Attached]:
    one, _ = monitor.adopt(1, TARGET, Policy(), Scripted(wanted=TIDS[:1]))
    return one.threads[TIDS[0]], one


def test_no_descriptor_for_the_watchdog_is_no_verdict(monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    thread, _ = held(monitor)

    def stat(_tid: int) -> ThreadStat:
        raise EMPTY

    monkeypatch.setattr(procfs, "stat", stat)
    sample = ThreadSample(0, 0, 0, 10**12, 0)
    assert watchdog.judge(thread, sample, period_ns=10**8) is Verdict.FINE


def test_no_descriptor_at_entering_is_a_refusal(
    journal: Journal, monitor: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = monitor.adopt(1, TARGET, Policy(), Scripted(wanted=TIDS[:1]))
    thread = one.threads[TIDS[0]]

    def stat(_tid: int) -> ThreadStat:
        raise EMPTY

    monkeypatch.setattr(procfs, "stat", stat)
    refused = Holder(clock=SystemClock(), journal=journal, metrics=Metrics()).enter(thread, one)
    assert isinstance(refused, FailedError)
    assert thread.state is ThreadState.WAITING
    assert "descriptor" in thread.reason


def test_what_is_not_in_the_journal_is_not_changed(
    journal: Journal, monitor: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, _ = monitor.adopt(1, TARGET, Policy(), Scripted(wanted=TIDS[:1]))
    thread = one.threads[TIDS[0]]
    entered: list[int] = []

    def hold(_rows: object) -> None:
        raise FailedError("the disk is full")

    monkeypatch.setattr(journal, "hold", hold)
    monkeypatch.setattr(reservation, "check_free", lambda _tid: SchedAttr())
    monkeypatch.setattr(reservation, "enter", lambda tid, **_values: entered.append(tid))
    refused = Holder(clock=SystemClock(), journal=journal, metrics=Metrics()).enter(thread, one)
    assert isinstance(refused, FailedError)
    assert (thread.state, thread.reason) == (ThreadState.WAITING, "the disk is full")
    assert thread.try_at_ns
    assert entered == []


def test_all_threads_are_given_back_whatever_fails_for_one(
    holder: Holder, monitor: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Scripted(wanted=TIDS[:5])
    one, _ = monitor.adopt(1, TARGET, Policy(), source)
    left: list[int] = []

    def leave(thread: Thread, _one: Attached, *, grow: bool = True) -> int:
        left.append(thread.tid)
        if thread.tid == TIDS[2]:
            raise RuntimeError(f"a bug, {grow}")
        return 0

    monkeypatch.setattr(holder, "leave", leave)
    with pytest.raises(RuntimeError):
        monitor.release(one)
    assert sorted(left) == list(TIDS[:5])
    assert source.closed == 1
    assert [tid for tid in TIDS if monitor.owner(tid)] == []


def test_histories_are_bounded_in_sum(monitor: Monitor) -> None:
    one, _ = monitor.adopt(1, TARGET, Policy(), Scripted())
    for thread in one.threads.values():
        thread.history.extend(
            Sample(time_ns=n, tid=thread.tid, budget_ns=1, executed_ns=1, run_delay_ns=1, multiplier=1)
            for n in range(10)
        )
    monitor.cycle()
    assert len(one.history()) == 10 * 64
    assert min(sample.time_ns for sample in one.history()) == 5  # the newest are kept
    assert len(one.history(7)) == 7
    assert one.history(7) == one.history()[-7:]
    assert one.history(0) == ()


def test_a_thread_that_somebody_took_and_that_ended_is_forgotten(
    monitor: Monitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Scripted(wanted=TIDS[:2])
    one, _ = monitor.adopt(1, TARGET, Policy(), source)
    one.threads[TIDS[0]].state = ThreadState.WAITING  # as after _taken: no try, no sampler
    monkeypatch.setattr(procfs, "stat", lambda tid: facts(tid, "Z" if tid == TIDS[0] else "S"))
    monitor.cycle()
    assert list(one.threads) == [TIDS[1]]
    assert source.forgotten == [TIDS[0]]


def test_a_row_that_can_t_be_erased_stops_nobody(
    holder: Holder,
    journal: Journal,
    monitor: Monitor,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, _ = monitor.adopt(1, TARGET, Policy(), Scripted(wanted=TIDS[:5]))

    def release(_threads: object) -> None:
        raise FailedError("the disk is full")

    monkeypatch.setattr(journal, "release", release)
    monitor.release(one)
    assert monitor.attachments == {}
    assert caplog.text.count("the disk is full") == 1
    holder.prune()


@pytest.fixture
async def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    monkeypatch.setattr(service_module, "become_real_time", lambda: "as ever")
    return Service(Runtime("test"), Settings(state_dir=str(tmp_path / "state"), max_threads=1))


async def test_one_probe_for_all_who_ask(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = 0

    async def probe() -> capacity.Found:
        nonlocal probes
        probes += 1
        await asyncio.sleep(0)
        return capacity.Found(cpus=2, available=1.5, resolution=0.1)

    monkeypatch.setattr(capacity, "probe_in_child", probe)
    try:
        found = await asyncio.gather(*(service.capacity() for _ in range(20)))
        assert {one.available for one in found} == {1.5}
        assert probes == 1
    finally:
        service.close()


async def test_an_attach_without_a_descriptor_is_an_answer(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def stat(_tid: int) -> ThreadStat:
        raise EMPTY

    monkeypatch.setattr(procfs, "stat", stat)
    try:
        with pytest.raises(FailedError, match="descriptor"):
            await service.attach(AttachRequest(target=Target(kind=TargetKind.THREAD, id=TIDS[0])))
    finally:
        service.close()


def test_a_broken_commit_is_an_answer(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        in_transaction = True

        def execute(self, text: str, *_values: object) -> None:
            if text in {"COMMIT", "ROLLBACK"}:
                raise sqlite3.OperationalError("database or disk is full")

    real = journal._db
    monkeypatch.setattr(journal, "_db", Failing())
    with pytest.raises(FailedError, match="disk is full"):
        journal.release([(1, 1, 5)])
    monkeypatch.setattr(journal, "_db", real)
