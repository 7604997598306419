"""What the kernel's refusals become; no reservation without RESET_ON_FORK. Nothing is changed here."""

import errno
import os
import threading

import pytest

from edgehold.errors import DeniedError, FailedError, NoCapacityError, NotFoundError
from edgehold.kernel import procfs, sched
from edgehold.kernel.procfs import GoneError
from edgehold.kernel.sched import Flag, Policy, SchedAttr

ATTR = SchedAttr.deadline(runtime_ns=10_000_000, period_ns=100_000_000)
# Above every pid_max (2^22, proc_sys_kernel(5)): nobody's thread.
NOBODY = 2**30


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EBUSY, NoCapacityError, ("EBUSY", "10 ms every 100 ms", "detach")),
        (errno.EPERM, DeniedError, ("EPERM", "CAP_SYS_NICE")),
        (errno.EINVAL, FailedError, ("EINVAL", "1024 ns")),
        (errno.EAGAIN, FailedError, ("EAGAIN", "try again")),
        (errno.ESRCH, NotFoundError, ("does not exist",)),
        (errno.EIO, FailedError, ("sched_setattr",)),
    ],
)
def test_every_errno_has_a_text_with_a_cure(number: int, kind: type[Exception], words: tuple[str, ...]) -> None:
    told = sched.explain(OSError(number, "sched_setattr of thread 7: why"), NOBODY, ATTR)
    assert isinstance(told, kind)
    assert all(word in told.message for word in words)
    assert told.retryable is (number in {errno.EBUSY, errno.EAGAIN})


def test_a_pinned_thread_is_told_that_it_is_pinned() -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    told: list[str] = []

    def pinned() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        told.append(sched.explain(OSError(errno.EPERM, "no"), threading.get_native_id(), ATTR).message)

    thread = threading.Thread(target=pinned)
    thread.start()
    thread.join()
    assert "pinned" in told[0]
    assert "cpuset.cpus.partition" in told[0]


def test_no_reservation_without_reset_on_fork() -> None:
    bare = SchedAttr(policy=Policy.DEADLINE, runtime_ns=1, deadline_ns=1, period_ns=1)
    assert bare.flags is Flag.NONE
    assert sched.to_raw(bare).flags & Flag.RESET_ON_FORK
    assert not sched.to_raw(SchedAttr(nice=5)).flags


def test_a_system_call_s_error_names_the_call() -> None:
    with pytest.raises(GoneError, match=f"thread {NOBODY}"):
        sched.get(NOBODY)
    with pytest.raises(OSError, match="sched_getattr of thread -1"):
        sched.get(-1)


def test_of_this_thread() -> None:
    assert sched.get().policy in Policy
    assert str(SchedAttr(nice=-5)) == "SCHED_OTHER nice -5"
    assert str(SchedAttr(policy=Policy.FIFO, priority=3)) == "SCHED_FIFO priority 3"


@pytest.mark.parametrize(("text", "cpus"), [("0-3,8\n", {0, 1, 2, 3, 8}), ("5", {5}), ("", set()), ("0,2-2", {0, 2})])
def test_cpu_lists(text: str, cpus: set[int]) -> None:
    assert sched.cpu_list(text) == cpus


STAT = b"42 (%s) S 1 42 42 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 98765 1 1 1 0 0 0\n"


@pytest.mark.parametrize("name", [b"a", b"", b") R 1 (", b"((()", b"x y\nz", b"\xff\xfe", b"0 (a) R"])
def test_a_name_can_t_forge_a_state(name: bytes) -> None:
    facts = procfs.parse_stat(STAT % name)
    assert (facts.tid, facts.state, facts.start_ticks, facts.kernel) == (42, "S", 98765, False)
    assert facts.name == name.decode(errors="replace")


def test_every_truncation_of_a_stat_is_refused_or_read_right() -> None:
    whole = STAT % b"name"
    for length in range(len(whole)):
        try:
            facts = procfs.parse_stat(whole[:length])
        except ValueError:
            continue
        assert facts.state == "S"


def test_a_kernel_thread_is_known_by_its_flag() -> None:
    assert procfs.parse_stat(STAT.replace(b"4194304", b"2129984") % b"kworker/0:1").kernel


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"dl.runtime                                   :             -1537880\ndl.deadline : 5\n", -1537880),
        (b"python3 (12, #threads: 1)\n-----\npolicy : 0\n", None),
        (b"dl.runtime : x\n", None),
        (b"", None),
    ],
)
def test_the_remaining_budget(text: bytes, value: int | None) -> None:
    assert procfs.parse_dl_runtime(text) == value


def test_who_is_gone_is_gone() -> None:
    for ask in (procfs.stat, procfs.process_of, procfs.threads, procfs.dl_runtime):
        with pytest.raises(GoneError):
            ask(NOBODY)
    with pytest.raises(GoneError):
        procfs.open_thread(NOBODY, "schedstat")
