"""The real daemon on the real kernel: what it holds, what it gives back, and what it survives."""

import asyncio
import contextlib
import grp
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from deadlined import reservation
from deadlined.journal import Journal, Row
from edgehold.api.deadlined import (
    Attachment,
    DeadlinedClient,
    Rule,
    Sample,
    Target,
    TargetKind,
    ThreadState,
)
from edgehold.errors import (
    BadRequestError,
    BadStateError,
    DeniedError,
    FailedError,
    NotFoundError,
    TimedOutError,
    UnavailableError,
)
from edgehold.kernel import procfs, sched
from edgehold.kernel.sampler import Sampler
from edgehold.kernel.sched import SchedAttr
from edgehold.testing.capability import missing, need_root
from edgehold.testing.daemons import Daemon
from edgehold.testing.load import Load, eventually
from tests.integration.deadlined_house import (  # noqa: F401 - fixtures
    MS,
    FakeVmand,
    client,
    daemon,
    directory,
    policy,
    process,
    settings,
    thread,
    until,
)

# Above every pid_max (2^22): nobody's thread.
NOBODY = 2**30


pytestmark = pytest.mark.usefixtures("deadline")


@pytest.mark.parametrize("rule", [Rule.FAST, Rule.REFERENCE])
async def test_the_budget_finds_the_need_and_detaching_gives_everything_back(
    client: DeadlinedClient, load: Load, rule: Rule
) -> None:
    pid = load.periodic(work_s=0.010, period_s=0.1).pid
    own = sched.get(pid)
    one = await client.attach(thread(pid), policy(2, rule=rule))
    assert one.threads[0].state is ThreadState.HELD
    assert sched.get(pid) == SchedAttr.deadline(runtime_ns=2 * MS, period_ns=100 * MS)

    def settled(samples: tuple[Sample, ...]) -> bool:
        last = samples[-5:]
        return len(samples) > 8 and all(1.05 < one.budget_ns / (10 * MS) < 1.6 for one in last)

    async def found() -> bool:
        return settled((await client.attachment(one.id)).history)

    await until(found, timeout_s=30, what="the budget is a little above 10 ms")
    history = (await client.attachment(one.id)).history
    assert history[0].budget_ns < 10 * MS
    assert max(sample.budget_ns for sample in history) > 20 * MS
    assert (max(sample.multiplier for sample in history) >= 4) is (rule is Rule.REFERENCE)
    await client.detach(one.id)
    assert sched.get(pid) == own
    assert await client.list_attachments() == []
    with pytest.raises(NotFoundError):
        await client.detach(one.id)


async def test_a_process_with_its_new_threads_and_those_that_end(
    client: DeadlinedClient, daemon: Daemon, load: Load
) -> None:
    child = load.sleeper()
    first = child.thread()
    one = await client.attach(process(child.pid), policy(2))
    assert [held.tid for held in one.threads] == sorted([child.pid, first])
    assert all(held.state is ThreadState.HELD for held in one.threads)
    cycles = (await client.attachment(one.id)).attachment.cycles
    new = child.thread()

    async def picked_up() -> Attachment:
        return (await client.attachment(one.id)).attachment

    async def has_new() -> bool:
        return any(held.tid == new and held.state is ThreadState.HELD for held in (await picked_up()).threads)

    await until(has_new, what="the new thread is held")
    assert (await picked_up()).cycles <= cycles + 2
    child.end_thread(new)
    child.end_thread(first)

    async def only_main() -> bool:
        return [held.tid for held in (await picked_up()).threads] == [child.pid]

    await until(only_main, what="the ended threads are forgotten")
    child.end()

    async def over() -> bool:
        return await client.list_attachments() == []

    await until(over, what="the attachment ended with its process")
    assert not [line for line in daemon.log_text().splitlines() if " WARNING " in line or " ERROR " in line]


async def test_a_thread_that_left_waits_for_the_safe_gap_even_across_a_restart(
    client: DeadlinedClient, daemon: Daemon, directory: Path, load: Load
) -> None:
    pid = load.hog().pid
    one = await client.attach(thread(pid))
    await client.detach(one.id)
    left = time.monotonic()
    again = await client.attach(thread(pid))
    assert again.threads[0].state is ThreadState.WAITING
    assert "throttled for ever" in again.threads[0].reason
    await client.detach(again.id)
    assert await daemon.stop() == 0
    await daemon.start()
    async with DeadlinedClient(directory / "api.sock") as second:
        again = await second.attach(thread(pid))
        if time.monotonic() - left < 0.9:
            assert again.threads[0].state is ThreadState.WAITING

        async def held() -> bool:
            return (await second.list_attachments())[0].threads[0].state is ThreadState.HELD

        await until(held, timeout_s=5, what="it is attached by itself")
        assert time.monotonic() - left > 0.9
        with Sampler() as sampler:
            begin = sampler.add(pid)
            eventually(
                lambda: sampler.sample()[pid].executed_ns > begin.executed_ns + 20 * MS,
                timeout_s=10,
                what="it executes",
            )


async def test_a_killed_daemon_s_successor_restores_everything(
    client: DeadlinedClient, daemon: Daemon, directory: Path, load: Load
) -> None:
    asleep, spinning = load.sleeper(), load.hog()
    asleep.thread()
    for tid in procfs.threads(asleep.pid):
        sched.set_attr(tid, SchedAttr(nice=3))
    await client.attach(process(asleep.pid), policy(20))
    await client.attach(thread(spinning.pid), policy(20))
    await daemon.kill()
    assert sched.get(spinning.pid).policy is sched.Policy.DEADLINE
    await daemon.start()
    for tid in procfs.threads(asleep.pid):
        assert (sched.get(tid).policy, sched.get(tid).nice) == (sched.Policy.OTHER, 3)
    assert sched.get(spinning.pid).policy is sched.Policy.OTHER
    assert "restored 3 threads" in daemon.log_text()
    assert "attachments are not kept over a restart" in daemon.log_text()
    async with DeadlinedClient(directory / "api.sock") as second:
        assert await second.list_attachments() == []
        again = await second.attach(thread(spinning.pid))  # recovering counts as leaving: the gap holds
        assert again.threads[0].state is ThreadState.WAITING
        assert again.id == 3  # 1 and 2 were the predecessor's


def row(tid: int, *, period_ns: int = 100 * MS) -> Row:
    return Row(
        tid=tid,
        start_ticks=procfs.stat(tid).start_ticks,
        original=SchedAttr(),
        period_ns=period_ns,
        max_budget_ns=period_ns * 8 // 10,
    )


async def test_what_a_stale_row_means_at_the_start(
    client: DeadlinedClient, daemon: Daemon, directory: Path, load: Load
) -> None:
    assert await client.list_attachments() == []
    assert await daemon.stop() == 0
    theirs, left, halfway = load.hog().pid, load.hog().pid, load.sleeper().pid
    journal = Journal(directory / "state", boot_id=procfs.boot_id())
    # A gap that is long enough for the start of a daemon on a busy machine.
    journal.hold([row(theirs), row(left, period_ns=4000 * MS), row(halfway)])
    journal.close()
    own = SchedAttr.deadline(runtime_ns=5 * MS, period_ns=50 * MS)
    sched.set_attr(theirs, own)  # by somebody else, since
    sched.set_attr(halfway, sched.SMALLEST)  # killed between shrinking and leaving
    await daemon.start()
    assert sched.get(theirs) == own
    assert sched.get(halfway).policy is sched.Policy.OTHER
    assert "restored 1 thread " in daemon.log_text()
    async with DeadlinedClient(directory / "api.sock") as second:
        # It was killed between the kernel's leaving and the journal's: when, nobody knows.
        one = await second.attach(thread(left))
        assert one.threads[0].state is ThreadState.WAITING
        assert "throttled for ever" in one.threads[0].reason
    sched.set_attr(theirs, SchedAttr())


@pytest.fixture
def small_disk(directory: Path) -> Iterator[Path]:
    """A file system of 512 KiB for the state; its mount ends with the test."""
    need_root()
    state = directory / "state"
    state.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k,mode=0700", "tmpfs", str(state)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        missing(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    yield state
    subprocess.run(["umount", str(state)], check=True)


def fill(state: Path) -> None:
    with contextlib.suppress(OSError), (state / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


async def test_a_full_disk_holds_nobody_new_and_restores_everybody(
    small_disk: Path, client: DeadlinedClient, daemon: Daemon, directory: Path, load: Load
) -> None:
    first, second, third = load.sleeper().pid, load.sleeper().pid, load.sleeper().pid
    one = await client.attach(thread(first))
    await client.attach(thread(second))
    fill(small_disk)
    with pytest.raises(FailedError, match="full"):
        await client.attach(thread(third))
    assert sched.get(third).policy is sched.Policy.OTHER
    await client.detach(one.id)
    assert sched.get(first).policy is sched.Policy.OTHER
    held = (await client.list_attachments())[0]
    await until(lambda: _has_samples(client, held.id), what="the cycle goes on")
    await daemon.kill()
    await daemon.start()  # to restore needs no room
    assert not [name for name in os.listdir(small_disk) if name.endswith(".broken")]  # noqa: PTH208
    assert sched.get(second).policy is sched.Policy.OTHER
    (small_disk / "ballast").unlink()
    async with DeadlinedClient(directory / "api.sock") as again:
        await again.attach(thread(third))
        fill(small_disk)
        assert await daemon.stop() == 0
    assert sched.get(third).policy is sched.Policy.OTHER


async def test_who_takes_an_idle_thread_is_noticed_and_so_is_its_end(client: DeadlinedClient, load: Load) -> None:
    child = load.sleeper()
    tid = child.thread()
    one = await client.attach(thread(tid), policy(1))  # its floor: the rule never wants another budget
    # By the way that leaks nothing: a sleeper that leaves straight takes its share with it for ever.
    reservation.leave(tid, SchedAttr(nice=4), period_ns=100 * MS, max_budget_ns=80 * MS)

    async def noticed() -> bool:
        taken = (await client.attachment(one.id)).attachment.threads[0]
        return taken.state is ThreadState.WAITING and "somebody else" in taken.reason

    await until(noticed, timeout_s=10, what="deadlined noticed")
    child.end_thread(tid)

    async def over() -> bool:
        return await client.list_attachments() == []

    await until(over, what="the attachment ended with its thread")


def _status(path: Path, request: str, group: int) -> str:
    """A request by the user nobody in a group: the answer's status, or the error's name."""
    code = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(int(sys.argv[3])); os.setuid(65534)\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "try: s.connect(sys.argv[1])\n"
        "except PermissionError: print('EACCES'); sys.exit()\n"
        "s.sendall(f'{sys.argv[2]} HTTP/1.1\\r\\nHost: d\\r\\nContent-Length: 0\\r\\n\\r\\n'.encode())\n"
        "print(s.recv(12).decode()[-3:])\n"
    )
    # By a name relative to its directory: the root directory of a test's host may be closed to that user.
    arguments = [sys.executable, "-c", code, path.name, request, str(group)]
    done = subprocess.run(arguments, cwd=path.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def open_directory(directory: Path) -> Path:
    """One through which everybody gets."""
    need_root()
    directory.chmod(0o711)
    return directory


async def test_the_groups_of_the_settings_have_their_roles(open_directory: Path) -> None:
    directory = open_directory
    readers = grp.getgrall()[1]
    path = directory / "api.sock"
    for access, mode in (({}, 0o600), ({"read": [readers.gr_name]}, 0o666)):
        one = Daemon("deadlined", directory=directory, settings=settings(directory) | {"access": access})
        await one.start()
        try:
            assert path.stat().st_mode & 0o777 == mode
            answers = [
                await asyncio.to_thread(_status, path, request, group)
                for request in ("GET /v1/attachments", "DELETE /v1/attachments/1")
                for group in (readers.gr_gid, 65534)
            ]
            assert answers == (["200", "403", "403", "403"] if access else ["EACCES"] * 4)
        finally:
            assert await one.stop() == 0


async def test_stopping_restores_everything(client: DeadlinedClient, daemon: Daemon, load: Load) -> None:
    child, hog = load.sleeper(), load.hog()
    await client.attach(process(child.pid))
    await client.attach(thread(hog.pid))
    assert await daemon.stop() == 0
    assert sched.get(child.pid).policy is sched.Policy.OTHER
    assert sched.get(hog.pid).policy is sched.Policy.OTHER


async def test_two_daemons_never_share_a_journal(client: DeadlinedClient, directory: Path, load: Load) -> None:
    pid = load.hog().pid
    await client.attach(thread(pid))
    (directory / "two").mkdir()
    second = Daemon("deadlined", directory=directory / "two", settings=settings(directory))
    with pytest.raises(FailedError, match="another deadlined uses it"):
        await second.start()
    assert sched.get(pid).policy is sched.Policy.DEADLINE


async def test_what_is_refused_and_why(client: DeadlinedClient, daemon: Daemon, load: Load) -> None:
    child = load.sleeper()
    other = child.thread()
    with pytest.raises(NotFoundError, match="does not exist"):
        await client.attach(thread(NOBODY))
    with pytest.raises(NotFoundError):
        await client.attach(process(NOBODY))
    with pytest.raises(DeniedError, match="deadlined's own"):
        await client.attach(thread(daemon.pid))
    with pytest.raises(BadRequestError, match=f"thread of process {child.pid}"):
        await client.attach(process(other))
    with pytest.raises(BadRequestError, match="min_budget_ns"):
        await client.attach(thread(child.pid), policy(floor_ms=90))
    with pytest.raises(UnavailableError, match="vmand"):
        await client.attach(Target(kind=TargetKind.PARTITION, id=1))
    await client.attach(thread(other))
    for target in (thread(other), thread(other)):
        with pytest.raises(BadStateError, match="already"):
            await client.attach(target)
    # A process takes in what nobody has: the other attachment keeps its thread.
    one = await client.attach(process(child.pid))
    assert [held.tid for held in one.threads] == [child.pid]
    with pytest.raises(BadStateError, match="is held already"):
        await client.attach(thread(child.pid))


async def test_somebody_else_s_reservation_and_a_pinned_thread(client: DeadlinedClient, load: Load) -> None:
    theirs = load.hog().pid
    sched.set_attr(theirs, SchedAttr.deadline(runtime_ns=5 * MS, period_ns=50 * MS))
    with pytest.raises(BadStateError, match="not by deadlined"):
        await client.attach(thread(theirs))
    assert sched.get(theirs).runtime_ns == 5 * MS
    sched.set_attr(theirs, SchedAttr())
    if len(os.sched_getaffinity(0)) > 1:
        pinned = load.sleeper().pid
        os.sched_setaffinity(pinned, {min(os.sched_getaffinity(0))})
        with pytest.raises(DeniedError, match="pinned"):
            await client.attach(thread(pinned))
    assert await client.list_attachments() == []


async def test_who_changes_a_policy_by_hand_keeps_it(client: DeadlinedClient, load: Load) -> None:
    pid = load.hog().pid
    one = await client.attach(thread(pid), policy(2))
    sched.set_attr(pid, SchedAttr(nice=4))

    async def left_alone() -> bool:
        held = (await client.attachment(one.id)).attachment.threads[0]
        return held.state is ThreadState.WAITING and "somebody else" in held.reason

    await until(left_alone, what="deadlined noticed")
    await client.detach(one.id)
    assert (sched.get(pid).policy, sched.get(pid).nice) == (sched.Policy.OTHER, 4)


async def test_no_bandwidth_is_an_answer_and_not_a_loop(client: DeadlinedClient, daemon: Daemon, load: Load) -> None:
    room = (await client.capacity()).available
    big = [load.hog().pid for _ in range(int(room / 0.8))]
    held = [await client.attach(thread(pid), policy(80, floor_ms=80)) for pid in big]
    waiting = await client.attach(thread(load.hog().pid), policy(80, floor_ms=80))

    async def waits() -> bool:
        one = (await client.attachment(waiting.id)).attachment.threads[0]
        return one.state is ThreadState.WAITING and "smallest budget" in one.reason

    await until(waits, what="it is told that not even the floor fits")
    await client.detach(waiting.id)
    small = await client.attach(thread(load.hog().pid), policy(2))

    async def compressed() -> bool:
        one = (await client.attachment(small.id)).attachment.threads[0]
        return one.state is ThreadState.HELD and one.budget_ns < one.wanted_ns and "shared by weight" in one.reason

    await until(compressed, what="it has what is left, and is told why not more")
    before = (await client.attachment(small.id)).attachment.threads[0].budget_ns
    await client.detach(held[0].id)

    async def raised() -> bool:
        one = (await client.attachment(small.id)).attachment.threads[0]
        return one.budget_ns > 1.2 * before

    await until(raised, what="what was given up is used")
    assert daemon.log_text().count("EBUSY") == 0


async def test_the_watchdog_revives_who_the_kernel_left_throttled(
    client: DeadlinedClient, daemon: Daemon, load: Load
) -> None:
    pid = load.hog().pid
    reservation = SchedAttr.deadline(runtime_ns=2 * MS, period_ns=100 * MS)
    one = await client.attach(thread(pid), policy(2, cap=0.02))

    with Sampler() as sampler:
        sampler.add(pid)

        async def stands_still() -> bool:
            begin = sampler.sample()[pid].executed_ns
            await asyncio.sleep(0.35)
            return sampler.sample()[pid].executed_ns == begin

        async def goes_on_or_is_found(before_ns: int) -> bool:
            return "left throttled" in daemon.log_text() or sampler.sample()[pid].executed_ns != before_ns

        # What the daemon never does: out of the reservation and in again after a little more than a period. Some of
        # the times the kernel then never replenishes the budget; the daemon's cap keeps the budget where it is.
        for attempt in range(40):
            await asyncio.sleep(0.31)
            sched.set_attr(pid, SchedAttr())
            await asyncio.sleep(0.11 + 0.01 * (attempt % 8))
            sched.set_attr(pid, reservation)
            if await stands_still() and await stands_still():
                # On a busy machine it may only be late: what overran much waits long, and goes on by itself.
                before = sampler.sample()[pid].executed_ns
                await until(partial(goes_on_or_is_found, before), timeout_s=60, what="it goes on, or is found")
            if "left throttled" in daemon.log_text():
                break
        else:
            pytest.skip("this kernel did not leave it throttled in 40 attempts")

        async def held() -> bool:
            return (await client.attachment(one.id)).attachment.threads[0].state is ThreadState.HELD

        await until(held, what="it is attached again")
        begin = sampler.sample()[pid]
        eventually(
            lambda: sampler.sample()[pid].executed_ns > begin.executed_ns + 5 * MS, timeout_s=10, what="it executes"
        )


async def test_metrics_and_health(client: DeadlinedClient, directory: Path, load: Load) -> None:
    import aiohttp

    await client.attach(thread(load.hog().pid), policy(10))
    await client.attach(thread(load.sleeper().pid), policy(20))
    connector = aiohttp.UnixConnector(path=str(directory / "api.sock"))
    async with aiohttp.ClientSession(connector=connector) as session:
        async with session.get("http://d/metrics") as response:
            text = await response.text()
        async with session.get("http://d/healthz") as response:
            assert response.status == 200
    assert "deadlined_attachments 2.0" in text
    assert 'deadlined_threads{state="held"} 2.0' in text
    for name in ("budget_cpus", "cycles_total", "cycle_overruns_total", "setattr_calls_total", "stuck_threads_total"):
        assert f"deadlined_{name} " in text


async def test_the_command(client: DeadlinedClient, daemon: Daemon, directory: Path, load: Load) -> None:
    assert daemon.running
    pid = load.hog().pid
    environment = os.environ | {"DEADLINED_SOCKET": str(directory / "api.sock")}

    def command(*arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "deadlined.cli", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == status, done.stderr
        return done.stdout if status == 0 else done.stderr

    async def run(*arguments: str, status: int = 0) -> str:
        return await asyncio.to_thread(command, *arguments, status=status)

    assert "nothing is attached" in await run("list")
    assert f"thread {pid}" in await run("attach", "--tid", str(pid), "--period-ms", "50", "--budget-ms", "5")
    attachment = json.loads(await run("--json", "list"))[0]
    assert attachment["policy"]["period_ns"] == 50 * MS
    await until(lambda: _has_samples(client, attachment["id"]), what="there are samples")
    shown = await run("show", str(attachment["id"]))
    assert "EXECUTED/ms" in shown
    assert "floor 1.00 ms" in shown
    assert len(json.loads(await run("--json", "show", "1"))["history"]) > 0
    assert "held" in await run("watch", "--count", "2", "--interval", "0.1")
    assert len((await run("--json", "watch", "--count", "3", "--interval", "0.05")).splitlines()) == 3
    assert "available" in await run("capacity")
    assert len(json.loads(await run("--json", "show", "1", "--last", "2"))["history"]) == 2
    assert await run("detach", str(attachment["id"])) == "attachment 1: detached\n"
    assert "not-found" in await run("detach", str(attachment["id"]), status=1)
    assert "give one of" in await run("attach", status=64)
    assert "'--cap'" in await run("attach", "--tid", str(pid), "--cap", "7", status=64)
    other = str(load.sleeper().pid)
    assert "8.00" in await run("attach", "--tid", other, "--period-ms", "10")  # the budget follows the period


async def _has_samples(client: DeadlinedClient, number: int) -> bool:
    return len((await client.attachment(number)).history) > 2


async def test_a_partition_s_vcpus_also_while_vmand_is_away(
    client: DeadlinedClient, directory: Path, load: Load
) -> None:
    guest, stranger = load.sleeper(), load.sleeper()
    vmand = FakeVmand(directory / "vmand.sock")
    await vmand.start()
    try:
        vmand.pid = guest.pid
        vmand.tids = [guest.thread(), stranger.pid]  # the second is no thread of the guest's process
        target = Target(kind=TargetKind.PARTITION, id=1)
        with pytest.raises(NotFoundError):
            await client.attach(Target(kind=TargetKind.PARTITION, id=3))
        one = await client.attach(target, policy(2))
        assert [held.tid for held in one.threads] == [vmand.tids[0]]

        async def now() -> Attachment:
            return (await client.attachment(one.id)).attachment

        async def holds(tids: list[int]) -> bool:
            return [held.tid for held in (await now()).threads if held.state is ThreadState.HELD] == sorted(tids)

        second = guest.thread()
        vmand.tids.append(second)
        known = [vmand.tids[0], second]

        async def told() -> bool:
            vmand.changed()
            return await holds(known)

        await until(told, what="an event brings the second vCPU")
        await vmand.stop()

        async def away() -> bool:
            return "vmand is away" in (await now()).reason

        await until(away, what="it is told that vmand is away")
        assert await holds(known)
        third = guest.thread()
        vmand.tids.append(third)
        await vmand.start()
        await until(lambda: holds([*known, third]), what="the view is fresh after the reconnection")
        assert (await now()).reason == ""
        vmand.tids = []
        vmand.changed()

        async def empty() -> bool:
            return (await now()).threads == () and "READY" in (await now()).reason

        await until(empty, what="no guest, no threads, and the reason")
        assert sched.get(third).policy is sched.Policy.OTHER
        await client.detach(one.id)
        vmand.mode = "dedicated"
        with pytest.raises(DeniedError, match="pinned"):
            await client.attach(target)
    finally:
        await vmand.stop()


async def test_a_partition_that_hangs_is_waited_for_by_nobody_else(
    client: DeadlinedClient, directory: Path, load: Load
) -> None:
    guest = load.sleeper()
    vmand = FakeVmand(directory / "vmand.sock")
    await vmand.start()
    try:
        vmand.pid = guest.pid
        vmand.tids = [guest.thread()]
        good, bad = [await client.attach(Target(kind=TargetKind.PARTITION, id=number), policy(2)) for number in (1, 2)]

        async def holds_all() -> bool:
            vmand.changed()
            one = (await client.attachment(good.id)).attachment
            return one.reason == "" and [held.tid for held in one.threads] == sorted(vmand.tids)

        vmand.hung = asyncio.Event()
        vmand.tids.append(guest.thread())
        await until(holds_all, timeout_s=10, what="the other partition's new vCPU", every_s=0.3)
        vmand.refusal = TimedOutError("its monitor does not answer")
        vmand.hung.set()
        vmand.tids.append(guest.thread())
        await until(holds_all, timeout_s=10, what="the other partition's next vCPU", every_s=0.3)
        reason = (await client.attachment(bad.id)).attachment.reason
        assert "partition 2 (its monitor does not answer)" in reason
        assert "away" not in reason
    finally:
        await vmand.stop()
