"""Events by read(2) and poll(2), and callers that are many, interrupted or killed."""

import errno
import os
import select
import signal
import subprocess
import sys
import threading

import pytest

from edgehold.kernel.vmanager import Cap, Event, Info, Manager, State
from edgehold.testing.vmanager import PATIENCE_S, Device, eventually, make, need, refused


def changes(events: list[Event]) -> list[tuple[int, State, State]]:
    return [(event.id, event.old, event.new) for event in events]


def test_events_are_told_to_whom_they_concern(manager: Manager, info: Info, kernel: int) -> None:
    need(info, Cap.EVENTS)
    with make(manager, partition=1) as one, make(manager, cpus=(2,), partition=2) as two:
        one.deploy(kernel)
        two.deploy(kernel)
        one.shutdown(force=True)
        own = [(1, State.READY, State.DEPLOYED), (1, State.DEPLOYED, State.READY)]
        events = manager.read_events()
        assert changes(events) == [
            (1, State.NONE, State.READY),
            (2, State.NONE, State.READY),
            own[0],
            (2, State.READY, State.DEPLOYED),
            own[1],
        ]
        assert [event.generation for event in events if event.id == 1] == [1, 2, 3]
        assert [event.time_ns for event in events] == sorted(event.time_ns for event in events)
        assert changes(one.read_events()) == own
        assert manager.read_events() == []
        manager.destroy(1)
        assert changes(one.read_events()) == [(1, State.READY, State.NONE)]
        assert os.read(one.fileno(), 4096) == b"", "the end"


def test_poll_says_when(manager: Manager, info: Info, kernel: int) -> None:
    need(info, Cap.EVENTS)
    poller = select.poll()
    poller.register(manager.fileno(), select.POLLIN)
    with make(manager) as handle:
        assert changes(manager.read_events()) == [(handle.id, State.NONE, State.READY)]
        assert poller.poll(0) == []
        handle.deploy(kernel, cmdline="vman.off=100")
        events: list[Event] = []
        while len(events) < 2:
            assert poller.poll(PATIENCE_S * 1000) == [(manager.fileno(), select.POLLIN)]
            events += manager.read_events()
        assert changes(events) == [
            (handle.id, State.READY, State.DEPLOYED),
            (handle.id, State.DEPLOYED, State.READY),
        ]
        partition = select.poll()
        partition.register(handle.fileno(), 0)
        assert partition.poll(0) == []
        manager.destroy(handle.id)
        assert partition.poll(PATIENCE_S * 1000) == [(handle.fileno(), select.POLLHUP)]


def test_a_slow_reader_is_told_what_it_lost(manager: Manager, info: Info, kernel: int) -> None:
    need(info, Cap.EVENTS, Cap.SUSPEND)
    with make(manager) as handle:
        handle.deploy(kernel)
        manager.read_events()
        for _ in range(200):
            handle.suspend()
            handle.restore()
        events: list[Event] = []

        def all_told() -> bool:
            events.extend(manager.read_events())
            return bool(events) and events[-1].lost > 0

        eventually(all_told)
        assert len(events) - 1 + events[-1].lost == 400
        handle.suspend()
        assert changes(manager.read_events()) == [(handle.id, State.DEPLOYED, State.SUSPENDED)]


def test_reads_are_whole_events(device: Device, manager: Manager, info: Info) -> None:
    need(info, Cap.EVENTS)
    if device.kind == "double":
        pytest.skip("the double's read(2) is a socket's")
    make(manager).close()
    with refused(errno.EINVAL):
        os.read(manager.fileno(), 31)
    make(manager, cpus=(2,)).close()
    assert len(os.read(manager.fileno(), 95)) == 64
    with refused(errno.EAGAIN):
        os.read(manager.fileno(), 4096)


def test_a_signal_does_not_interrupt(manager: Manager, info: Info, kernel: int) -> None:
    need(info, Cap.SHUTDOWN)
    seen: list[int] = []
    old = signal.signal(signal.SIGALRM, lambda number, _frame: seen.append(number))
    try:
        with make(manager) as handle:
            handle.deploy(kernel, cmdline="vman.obey=500")
            signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
            assert handle.shutdown(timeout_ms=PATIENCE_S * 1000) is State.READY
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
    assert seen


@pytest.mark.parametrize("call", ["handle.shutdown(timeout_ms=600_000)", "handle.deploy(kernel, cmdline='vman.hang')"])
def test_a_caller_that_is_killed_leaves_nothing_stuck(
    device: Device, manager: Manager, info: Info, kernel: int, call: str
) -> None:
    need(info, Cap.SHUTDOWN, Cap.EVENTS)
    code = (
        "import sys\n"
        "from edgehold.kernel.vmanager import Manager\n"
        "handle, kernel = Manager.open(sys.argv[1]).open_partition(int(sys.argv[2])), int(sys.argv[3])\n"
        f"print('now', flush=True)\n{call}\n"
    )
    with make(manager) as handle:
        if "shutdown" in call:
            handle.deploy(kernel, cmdline="vman.deaf")
        argv = [sys.executable, "-c", code, str(device.path), str(handle.id), str(kernel)]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, pass_fds=(kernel,)) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"now\n"
            eventually(lambda: handle.status().state is not State.READY)
            process.kill()
        assert handle.status().state is (State.DEPLOYED if "shutdown" in call else State.BUSY)
        assert handle.shutdown(force=True) is State.READY
        handle.deploy(kernel)


def test_many_callers_at_once(manager: Manager, info: Info, kernel: int) -> None:
    """Each partition by a thread of its own, and all of them listed meanwhile."""
    failures: list[BaseException] = []

    def live(core: int) -> None:
        try:
            for _ in range(20):
                with make(manager, cpus=(core,)) as handle:
                    handle.deploy(kernel)
                    handle.shutdown(force=True)
                manager.destroy(handle.id)
        except BaseException as error:  # noqa: BLE001 - told below, in the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=live, args=(core,)) for core in info.cpus]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        at: int | None = 0
        while at is not None:
            at = manager.next(at)
    for thread in threads:
        thread.join()
    assert failures == []
    assert manager.info().num_partitions == 0
