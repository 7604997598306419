"""The kernel's own list of deadline threads, beside what /proc says of the same threads."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deadlined import reservation
from edgehold.errors import UnsupportedError
from edgehold.kernel import procfs, sched
from edgehold.kernel.procfs import GoneError
from edgehold.kernel.sched import Policy, SchedAttr
from edgehold.kernel.taskiter import TaskBuffer, TaskIterator, TaskRecord
from edgehold.testing.capability import missing, need_command, need_root
from edgehold.testing.load import Load, eventually

MS = 1_000_000
P = 100 * MS
# So small that many fit, and so long that what wakes up to end is not throttled.
TINY = SchedAttr.deadline(runtime_ns=200_000, period_ns=4_000 * MS)
# More than a buffer of the kernel's holds (32 KiB of 64 bytes each).
MANY = 600

pytestmark = pytest.mark.usefixtures("deadline")

_OPEN = """
import resource, sys
from edgehold.errors import UnsupportedError
from edgehold.kernel.taskiter import TaskBuffer, TaskIterator
limit = int(sys.argv[1])
try:
    if limit: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    with TaskIterator.open() as threads:
        print("opened")
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        threads.read(TaskBuffer())
except UnsupportedError as error:
    print(error)
except OSError as error:
    print("errno", error.errno)
"""


@pytest.fixture
def iterator() -> Iterator[TaskIterator]:
    try:
        one = TaskIterator.open()
    except UnsupportedError as error:
        missing(str(error))
    with one:
        yield one


def hold(tid: int, attr: SchedAttr) -> None:
    sched.set_attr(tid, attr)


def free(tid: int) -> None:
    reservation.leave(tid, SchedAttr(), period_ns=P, max_budget_ns=80 * MS)


def asleep(tid: int) -> None:
    eventually(lambda: procfs.stat(tid).state == "S", timeout_s=20, what="it sleeps")


def counters(tid: int) -> tuple[int, ...]:
    return tuple(int(word) for word in Path(f"/proc/{tid}/task/{tid}/schedstat").read_text().split())


def found(iterator: TaskIterator) -> dict[int, TaskRecord]:
    """By tid. Others' reservations are in it too."""
    buffer = TaskBuffer()
    assert iterator.read(buffer) == buffer.count
    records = {one.tid: one for one in buffer.records()}
    assert len(records) == buffer.count, "a thread came twice"
    return records


def opened(*before: str, limit: int = 0) -> str:
    """What opening it says in a process that was started through ``before``."""
    argv = [*before, sys.executable, "-c", _OPEN, str(limit)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_sleeper_has_the_counters_of_its_files_exactly(iterator: TaskIterator, load: Load) -> None:
    child = load.sleeper()
    tids = [child.pid, *(child.thread() for _ in range(3))]
    for tid in tids:
        asleep(tid)
        hold(tid, TINY)
    seen: dict[int, TaskRecord] = {}

    def compare() -> bool:
        before = {tid: counters(tid) for tid in tids}
        seen.update(found(iterator))
        return before == {tid: counters(tid) for tid in tids}

    eventually(compare, timeout_s=20, what="nobody woke up while we looked")
    for tid in tids:
        one, stat = seen[tid], procfs.stat(tid)
        assert (one.executed_ns, one.run_delay_ns, one.timeslices) == counters(tid)
        assert one.state == stat.state == "S"
        assert one.start_ticks == stat.start_ticks
        assert not one.throttled
    for tid in tids:
        free(tid)
    assert not found(iterator).keys() & set(tids), "it is in the list no longer than in SCHED_DEADLINE"


def test_a_hog_s_counters_are_between_two_looks_at_its_file(iterator: TaskIterator, load: Load) -> None:
    hog = load.hog().pid
    hold(hog, SchedAttr.deadline(runtime_ns=10 * MS, period_ns=P))
    throttled = running = False

    def seen() -> bool:
        nonlocal throttled, running
        before = counters(hog)
        one = found(iterator)[hog]
        after = counters(hog)
        mine = (one.executed_ns, one.run_delay_ns, one.timeslices)
        assert all(low <= value <= high for low, value, high in zip(before, mine, after, strict=True))
        assert one.state == "R"
        assert one.start_ticks == procfs.stat(hog).start_ticks
        throttled |= one.throttled and one.dl_runtime_ns <= 0
        running |= not one.throttled and one.dl_runtime_ns > 0
        return running and (throttled or not iterator.knows_throttled)

    eventually(seen, timeout_s=30, what="it was seen throttled, and not throttled")
    free(hog)


def test_only_deadline_threads_are_in_it(iterator: TaskIterator, load: Load) -> None:
    child = load.sleeper()
    held, other = child.thread(), child.thread()
    asleep(held)
    hold(held, TINY)
    sched.set_attr(other, SchedAttr(policy=Policy.FIFO, priority=1))
    records = found(iterator)
    assert held in records
    assert not records.keys() & {other, child.pid, os.getpid()}
    free(held)


def test_many_threads_are_all_there_once(iterator: TaskIterator, load: Load) -> None:
    child = load.sleeper()
    tids = [child.thread() for _ in range(MANY)]
    for tid in tids:
        asleep(tid)
        hold(tid, TINY)
    buffer = TaskBuffer(1)
    assert iterator.read(buffer) >= MANY, "it grew"
    for _ in range(3):
        iterator.read(buffer)
        listed = [one.tid for one in buffer.records() if one.tid in set(tids)]
        assert listed == sorted(tids)
    for tid in tids:
        free(tid)


def test_an_ended_thread_is_told_until_it_is_waited_for(iterator: TaskIterator) -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    try:
        asleep(process.pid)
        hold(process.pid, SchedAttr.deadline(runtime_ns=20 * MS, period_ns=P))
        assert found(iterator)[process.pid].state == "S"
        process.send_signal(signal.SIGKILL)
        eventually(lambda: procfs.stat(process.pid).ended, timeout_s=30, what="it is over")
        one = found(iterator)[process.pid]
        assert one.state == procfs.stat(process.pid).state == "Z"
    finally:
        process.kill()
        process.wait()
    assert process.pid not in found(iterator)
    with pytest.raises(GoneError):
        procfs.stat(process.pid)


def test_closing_gives_everything_back() -> None:
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    try:
        iterator = TaskIterator.open()
    except UnsupportedError as error:
        missing(str(error))
    assert len(os.listdir("/proc/self/fd")) == len(before) + 2  # noqa: PTH208
    buffer = TaskBuffer()
    iterator.read(buffer)
    iterator.close()
    iterator.close()
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    with pytest.raises(OSError, match="closed") as refused:
        iterator.read(buffer)
    assert refused.value.errno == errno.EBADF
    with pytest.raises(OSError, match="closed"):
        _ = iterator.knows_throttled


@pytest.mark.usefixtures("iterator")
@pytest.mark.parametrize(
    ("dropped", "words"),
    [
        ("-sys_admin,-bpf", "lacks CAP_BPF (a unit's CapabilityBoundingSet="),
        ("-sys_admin,-perfmon", "lacks CAP_PERFMON (a unit's"),
        ("-sys_admin,-bpf,-perfmon", "lacks CAP_BPF and CAP_PERFMON (a unit's"),
    ],
)
def test_without_the_privilege_it_says_which(dropped: str, words: str) -> None:
    need_root()
    said = opened(need_command("setpriv", "util-linux"), f"--bounding-set={dropped}")
    assert words in said
    assert "Operation not permitted" in said


@pytest.mark.usefixtures("iterator")
def test_the_two_capabilities_are_enough() -> None:
    need_root()
    setpriv = need_command("setpriv", "util-linux")
    # dac_override: the checkout itself may be somebody else's, and closed.
    assert opened(setpriv, "--bounding-set=-all,+bpf,+perfmon,+dac_override").startswith("opened")


def test_in_another_pid_namespace_it_is_refused() -> None:
    need_root()
    said = opened(need_command("unshare", "util-linux"), "--pid", "--fork")
    assert "not in the host's pid namespace" in said


@pytest.mark.usefixtures("iterator")
def test_in_a_user_namespace_its_capabilities_count_for_nothing() -> None:
    unshare = need_command("unshare", "util-linux")
    if subprocess.run([unshare, "--user", "--map-root-user", "true"], capture_output=True, check=False).returncode:
        # None can be made from within a chroot (user_namespaces(7), EPERM), and some hosts have none.
        pytest.skip("no user namespaces here")
    assert "user namespace" in opened(unshare, "--user", "--map-root-user")


def test_without_a_kernel_s_description_it_says_so() -> None:
    need_root()
    # Only /sys is made private: in a chroot / is no mount whose propagation could be changed.
    script = 'mount --make-rprivate /sys && mount -t tmpfs none /sys && exec "$@"'
    hidden = ["--mount", "--propagation", "unchanged", "sh", "-ec", script, "sh"]
    assert "CONFIG_DEBUG_INFO_BTF=y" in opened(need_command("unshare", "util-linux"), *hidden)


@pytest.mark.usefixtures("iterator")
def test_a_lack_of_descriptors_is_a_moment_s_and_no_refusal() -> None:
    assert opened(limit=3) == f"errno {errno.EMFILE}"
    assert opened() == f"opened\nerrno {errno.EMFILE}"
