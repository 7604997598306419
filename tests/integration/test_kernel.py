"""The extension and the probe on the kernel that is here: real policies, real counters, nothing left behind."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from edgehold.kernel import capacity, native, procfs, sched
from edgehold.kernel.sampler import Sampler
from edgehold.kernel.sched import Flag, Policy, SchedAttr
from edgehold.testing.load import Load, available, eventually, settled

MS = 1_000_000
ATTR = SchedAttr.deadline(runtime_ns=10 * MS, period_ns=100 * MS)


pytestmark = pytest.mark.usefixtures("deadline")


def test_set_and_get_say_the_same(load: Load) -> None:
    tid = load.hog().pid
    sched.set_attr(tid, ATTR)
    assert sched.get(tid) == ATTR
    sched.set_attr(tid, SchedAttr(policy=Policy.FIFO, priority=1))
    assert sched.get(tid) == SchedAttr(policy=Policy.FIFO, priority=1)
    sched.restore(tid, SchedAttr(policy=Policy.BATCH, nice=7, flags=Flag.RESET_ON_FORK))
    after = sched.get(tid)
    assert (after.policy, after.nice, after.flags) == (Policy.BATCH, 7, Flag.RESET_ON_FORK)


@pytest.mark.parametrize(
    ("runtime", "period", "number"),
    [
        (1023, 100 * MS, errno.EINVAL),
        (1024, 100 * MS, 0),
        (50_000, 99_999, errno.EINVAL),
        (50_000, 100_000, 0),
        (1 * MS, 4_194_304_000, 0),
        (1 * MS, 4_194_305_000, errno.EINVAL),
        (2 * MS, 1 * MS, errno.EINVAL),
    ],
)
def test_the_bounds_are_the_kernel_s(runtime: int, period: int, number: int) -> None:
    refused: list[OSError] = []

    def attempt() -> None:  # sets and unsets itself: a running thread leaves nothing behind
        try:
            sched.set_attr(0, SchedAttr.deadline(runtime_ns=runtime, period_ns=period))
            sched.set_attr(0, SchedAttr())
        except OSError as error:
            refused.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    assert [error.errno for error in refused] == ([number] if number else [])
    assert all("sched_setattr of this thread" in str(error) for error in refused)


def test_a_held_program_can_still_fork_and_its_children_are_free() -> None:
    code = (
        "import os, sys, threading\n"
        "from edgehold.kernel import sched\n"
        "sched.set_attr(0, sched.SchedAttr.deadline(runtime_ns=50_000_000, period_ns=100_000_000))\n"
        "found = []\n"
        "thread = threading.Thread(target=lambda: found.append(sched.get().policy.name))\n"
        "thread.start(); thread.join()\n"
        "pid = os.fork()\n"
        "if pid == 0: os._exit(int(sched.get().policy))\n"
        "found.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
        "sched.set_attr(0, sched.SchedAttr()); print(found)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['OTHER', 0]"


def test_a_pinned_thread_is_refused_and_told_why(load: Load) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs")
    tid = load.sleeper().pid
    os.sched_setaffinity(tid, {min(os.sched_getaffinity(0))})
    with pytest.raises(PermissionError) as refused:
        sched.set_attr(tid, ATTR)
    assert "pinned" in sched.explain(refused.value, tid, ATTR).message


def test_twenty_probes_in_a_row_agree_and_leave_nothing() -> None:
    settled(available)
    found = [capacity.probe() for _ in range(20)]
    assert len({one.available for one in found}) == 1, [one.available for one in found]
    assert found[0].available > 0.5
    assert sched.get().policy is not Policy.DEADLINE


async def test_the_probe_runs_nothing_that_lies_in_the_directory_where_it_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "argparse.py").write_text("raise SystemExit(99)\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert (await capacity.probe_in_child()).cpus > 0


async def test_a_probe_in_a_child_agrees() -> None:
    settled(available)
    inside = capacity.probe()
    outside = await capacity.probe_in_child()
    assert outside == inside


def test_what_is_held_is_missing_from_the_capacity(load: Load) -> None:
    before = settled(available)
    tid = load.hog().pid
    sched.set_attr(tid, SchedAttr.deadline(runtime_ns=30 * MS, period_ns=100 * MS))
    during = capacity.probe()
    assert before - during.available == pytest.approx(0.3, abs=2 * during.resolution)
    sched.set_attr(tid, SchedAttr())
    eventually(lambda: capacity.probe().available >= before, timeout_s=5, what="the bandwidth came back")


def test_counters_move_as_they_should(load: Load) -> None:
    hog, sleeper = load.hog().pid, load.sleeper().pid
    with Sampler() as sampler:
        begin = {tid: sampler.add(tid) for tid in (hog, sleeper)}
        eventually(
            lambda: sampler.sample()[hog].executed_ns - begin[hog].executed_ns > 50 * MS, timeout_s=10, what="it spun"
        )
        end = sampler.sample()
        assert list(end) == [hog, sleeper]
        assert end[sleeper].executed_ns - begin[sleeper].executed_ns < 20 * MS
        elapsed = end[hog].time_ns - begin[hog].time_ns
        moved = end[hog].executed_ns - begin[hog].executed_ns + end[hog].run_delay_ns - begin[hog].run_delay_ns
        assert 0 < moved < elapsed + 10 * MS
        assert abs(end[hog].time_ns - time.monotonic_ns()) < 1_000 * MS


def test_a_thread_that_ended_reads_as_gone_and_the_others_go_on(load: Load) -> None:
    child = load.sleeper()
    gone = child.thread()
    with Sampler() as sampler:
        sampler.add(gone)
        sampler.add(child.pid)
        child.end_thread(gone)
        samples = sampler.sample()
        assert samples[gone].errno == errno.ESRCH
        assert samples[child.pid].errno == 0
        sampler.discard(gone)
        sampler.discard(gone)
        assert list(sampler.sample()) == [child.pid]
        with pytest.raises(procfs.GoneError):
            sampler.add(gone)


def test_many_threads_in_one_call(load: Load) -> None:
    child = load.sleeper()
    tids = [child.thread() for _ in range(200)]
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with Sampler() as sampler:
        for tid in tids:
            sampler.add(tid)
        samples = sampler.sample()
        assert list(samples) == tids
        assert all(one.errno == 0 and one.timeslices > 0 for one in samples.values())
    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize("kind", ["sleeper", "hog"])
def test_leaving_tells_by_which_state(load: Load, kind: str) -> None:
    tid = load.sleeper().pid if kind == "sleeper" else load.hog().pid
    if kind == "sleeper":
        eventually(lambda: procfs.stat(tid).state == "S", timeout_s=5, what="it sleeps")
    sched.set_attr(tid, ATTR)
    fd = procfs.open_thread(tid, "stat")
    left = native.sched_leave(
        tid, fd, if_asleep=sched.to_raw(sched.SMALLEST), if_running=None, wanted=sched.to_raw(SchedAttr())
    )
    os.close(fd)
    assert left == native.RawLeft(state="S" if kind == "sleeper" else "R", step_errno=0, fallback=False, errno=0)
    assert sched.get(tid).policy is Policy.OTHER


def test_a_sleeper_that_can_t_be_shrunk_stays_unless_no_step_is_asked_for(load: Load) -> None:
    tid = load.sleeper().pid
    eventually(lambda: procfs.stat(tid).state == "S", timeout_s=5, what="it sleeps")
    sched.set_attr(tid, ATTR)
    fd = procfs.open_thread(tid, "stat")
    impossible = native.RawAttr(*sched.to_raw(sched.SMALLEST)[:4], 1, 2, 3)
    to = sched.to_raw(SchedAttr())
    left = native.sched_leave(tid, fd, if_asleep=impossible, if_running=None, wanted=to)
    now = sched.get(tid)
    native.sched_leave(tid, fd, if_asleep=sched.to_raw(sched.SMALLEST), if_running=None, wanted=to)
    os.close(fd)
    assert left == native.RawLeft("S", errno.EINVAL, fallback=False, errno=0, stayed=True)
    assert (now.policy, now.runtime_ns, now.period_ns) == (Policy.DEADLINE, ATTR.runtime_ns, ATTR.period_ns)
    assert sched.get(tid).policy is Policy.OTHER


def test_a_refused_policy_never_leaves_the_smallest_reservation_in_place(load: Load) -> None:
    tid = load.sleeper().pid
    eventually(lambda: procfs.stat(tid).state == "S", timeout_s=5, what="it sleeps")
    sched.set_attr(tid, ATTR)
    fd = procfs.open_thread(tid, "stat")
    impossible = SchedAttr(policy=Policy.FIFO, priority=100)  # 99 is the most
    left = native.sched_leave(
        tid, fd, if_asleep=sched.to_raw(sched.SMALLEST), if_running=None, wanted=sched.to_raw(impossible)
    )
    os.close(fd)
    assert left.fallback
    assert left.errno == errno.EINVAL
    assert sched.get(tid).policy is Policy.OTHER
