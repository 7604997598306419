"""The real daemon on the real kernel: rules, shares, changes, suspended guests, what is attached after a restart."""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgehold.api.deadlined import (
    Attachment,
    DeadlinedClient,
    PeriodOrigin,
    Rule,
    Target,
    TargetKind,
    ThreadState,
    ThreadStatus,
)
from edgehold.errors import BadRequestError, DeniedError, NotFoundError
from edgehold.kernel import procfs, sched
from edgehold.kernel.sched import SchedAttr
from edgehold.testing.capability import missing, need_root
from edgehold.testing.daemons import Daemon
from edgehold.testing.load import Load
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

pytestmark = pytest.mark.usefixtures("deadline")
PARTITION = Target(kind=TargetKind.PARTITION, id=1)


async def first(client: DeadlinedClient, number: int) -> ThreadStatus:
    return (await client.attachment(number, last=0)).attachment.threads[0]


async def when(
    client: DeadlinedClient, number: int, true: Callable[[ThreadStatus], bool], what: str, *, timeout_s: float = 20
) -> ThreadStatus:
    """The first thread's status once something is true of it."""
    seen: list[ThreadStatus] = []

    async def look() -> bool:
        seen.append(await first(client, number))
        return true(seen[-1])

    await until(look, timeout_s=timeout_s, what=what)
    return seen[-1]


async def test_a_saturated_thread_gets_the_cap_and_then_what_it_needs(client: DeadlinedClient, load: Load) -> None:
    pid = load.periodic(work_s=0.015, period_s=0.1).pid
    one = await client.attach(thread(pid), {"initial_budget_ns": 2 * MS})
    await when(client, one.id, lambda held: held.wanted_ns == 80 * MS, "it never slept, so it gets the cap")
    await when(client, one.id, lambda held: 15.5 * MS < held.budget_ns < 25 * MS, "and then a little above the need")
    history = (await client.attachment(one.id)).history
    assert any(sample.saturated for sample in history)
    assert history[0].elapsed_ns < 180 * MS  # the first look is a short one


async def test_more_wants_than_there_is_are_shared_by_weight(client: DeadlinedClient, load: Load) -> None:
    light = [await client.attach(thread(load.hog().pid), policy(10)) for _ in range(3)]
    heavy = await client.attach(thread(load.hog().pid), {"weight": 200})

    async def settled() -> bool:
        now = [await first(client, one.id) for one in (*light, heavy)]
        small, large = [held.budget_ns for held in now[:3]], now[3].budget_ns
        return (
            all("shared by weight" in held.reason for held in now)
            and max(small) - min(small) < 0.1 * MS
            and (abs(large - 2 * small[0]) < 0.2 * MS or large == 80 * MS)
        )

    await until(settled, what="each has his share, and the reason")
    found = await client.capacity()
    assert found.held <= found.available + found.held
    assert found.wanted > found.held
    before = (await first(client, light[0].id)).budget_ns
    await client.detach(heavy.id)
    await when(client, light[0].id, lambda held: held.budget_ns > 1.2 * before, "what one gives up the others get")


async def test_a_policy_can_be_changed_in_place(client: DeadlinedClient, load: Load) -> None:
    pid = load.periodic(work_s=0.010, period_s=0.1).pid
    one = await client.attach(thread(pid), policy(30, rule=Rule.FIXED))
    assert sched.get(pid) == SchedAttr.deadline(runtime_ns=30 * MS, period_ns=100 * MS)
    await client.change(one.id, {"initial_budget_ns": 40 * MS})
    await when(client, one.id, lambda held: held.budget_ns == 40 * MS, "another fixed budget")
    changed = await client.change(one.id, {"period_ns": 50 * MS, "initial_budget_ns": 20 * MS})
    assert changed.threads[0].period_ns == 50 * MS
    assert sched.get(pid) == SchedAttr.deadline(runtime_ns=20 * MS, period_ns=50 * MS)
    await client.change(one.id, {"rule": "fast"})
    await when(client, one.id, lambda held: 4.5 * MS < held.budget_ns < 12 * MS, "sized from now on")
    for wrong, words in (
        ({"rule": "slow"}, "rule"),
        ({"dry_run": True}, "anew"),
        ({"actuator": "cpu.max"}, "cgroup"),
        ({"min_budget_ns": 90 * MS}, "above cap"),
        ({"colour": 1}, "colour"),
    ):
        with pytest.raises(BadRequestError, match=words):
            await client.change(one.id, wrong)
    with pytest.raises(NotFoundError):
        await client.change(99, {})
    await client.detach(one.id)
    assert sched.get(pid).policy is sched.Policy.OTHER


async def test_a_dry_run_only_tells(client: DeadlinedClient, load: Load) -> None:
    pid = load.periodic(work_s=0.020, period_s=0.1).pid
    one = await client.attach(thread(pid), {"dry_run": True})
    assert one.threads[0].state is ThreadState.WATCHED
    told = await when(client, one.id, lambda held: held.wanted_ns > 15 * MS, "what it would set")
    assert told.budget_ns == 0
    assert sched.get(pid).policy is sched.Policy.OTHER
    assert (await client.capacity()).wanted == 0


async def test_a_suspended_guest_s_reservation_shrinks_and_comes_back(
    client: DeadlinedClient, directory: Path, load: Load
) -> None:
    guest = load.periodic(work_s=0.020, period_s=0.1)
    vmand = FakeVmand(directory / "vmand.sock")
    await vmand.start()
    try:
        vmand.pid, vmand.tids = guest.pid, [guest.pid]
        one = await client.attach(PARTITION)
        before = await when(client, one.id, lambda held: 20 * MS < held.budget_ns < 40 * MS, "it is sized")
        vmand.state = "SUSPENDED"
        vmand.changed()
        await when(client, one.id, lambda held: held.budget_ns == MS, "the floor")
        assert (await client.list_attachments())[0].suspended
        vmand.state = ""
        vmand.changed()
        cycles = (await client.list_attachments())[0].cycles
        after = await when(client, one.id, lambda held: held.budget_ns > 10 * MS, "it is back")
        assert (await client.list_attachments())[0].cycles <= cycles + 2
        assert abs(after.budget_ns - before.budget_ns) < 15 * MS
    finally:
        await vmand.stop()


async def test_what_has_a_lasting_name_is_attached_again_after_a_restart(
    client: DeadlinedClient, daemon: Daemon, directory: Path, load: Load
) -> None:
    guest, other = load.sleeper(), load.sleeper()
    vmand = FakeVmand(directory / "vmand.sock")
    await vmand.start()
    try:
        vmand.pid, vmand.tids = guest.pid, [guest.pid]
        one = await client.attach(PARTITION, {"initial_budget_ns": 4 * MS})
        await client.attach(thread(other.pid))
        await vmand.stop()
        await daemon.kill()
        await daemon.start()
        async with DeadlinedClient(directory / "api.sock") as again:
            (kept,) = await again.list_attachments()
            assert (kept.id, kept.target, kept.policy) == (one.id, one.target, one.policy)
            assert sched.get(other.pid).policy is sched.Policy.OTHER

            async def told() -> bool:
                return "vmand" in (await again.list_attachments())[0].reason

            await until(told, what="it is told what it waits for")
            await vmand.start()

            async def held() -> bool:
                threads = (await again.list_attachments())[0].threads
                return [one.state for one in threads] == [ThreadState.HELD]

            await until(held, timeout_s=40, what="it is held once vmand is there")
            await again.detach(one.id)
            assert await daemon.stop() == 0
        await daemon.start()
        async with DeadlinedClient(directory / "api.sock") as third:
            assert await third.list_attachments() == []
    finally:
        await vmand.stop()


async def test_targets_of_the_settings_and_the_deny_lists(directory: Path, load: Load) -> None:
    child = load.sleeper()
    name = procfs.stat(child.pid).name
    vmand = FakeVmand(directory / "vmand.sock")
    await vmand.start()
    vmand.pid, vmand.tids = child.pid, [child.pid]
    wanted = settings(directory) | {
        "attach": [{"target": {"kind": "partition", "id": 1}, "policy": {"initial_budget_ns": 3 * MS}}],
        "policy": {"weight": 7},
    }
    one = Daemon("deadlined", directory=directory, settings=wanted)
    try:
        await one.start()
        async with DeadlinedClient(directory / "api.sock") as client:
            held = await when_held(client)
            assert (held.policy.weight, held.policy.initial_budget_ns) == (7, 3 * MS)
        assert await one.stop() == 0
        one = Daemon(
            "deadlined", directory=directory, settings=settings(directory) | {"deny": {"names": [name[:4] + "*"]}}
        )
        await one.start()
        async with DeadlinedClient(directory / "api.sock") as client:
            with pytest.raises(DeniedError, match=r"deny\.names"):
                await client.attach(process(child.pid))
        assert await one.stop() == 0
    finally:
        await vmand.stop()
        if one.running:
            await one.stop()
    assert "Traceback" not in one.log_text()


async def when_held(client: DeadlinedClient) -> Attachment:
    found: list[Attachment] = []

    async def held() -> bool:
        found[:] = await client.list_attachments()
        return bool(found and found[0].threads and found[0].threads[0].state is ThreadState.HELD)

    await until(held, what="the only attachment is held")
    return found[0]


async def test_a_period_that_a_thread_shows_is_its_reservation_s(client: DeadlinedClient, load: Load) -> None:
    pid = load.periodic(work_s=0.004, period_s=0.04).pid
    one = await client.attach(thread(pid), {"period_ns": "auto", "initial_budget_ns": 20 * MS})
    assert one.threads[0].period_origin is PeriodOrigin.OBSERVING
    found = await when(
        client, one.id, lambda held: held.period_origin is not PeriodOrigin.OBSERVING, "an answer", timeout_s=60
    )
    if found.period_origin is PeriodOrigin.UNKNOWN:
        missing("this host is too busy for a thread to keep its period")
    assert abs(found.period_ns - 40 * MS) < 0.4 * MS
    assert found.confidence > 0.5
    assert sched.get(pid).period_ns == found.period_ns


async def test_a_tree_with_what_it_starts_later(client: DeadlinedClient, load: Load) -> None:
    child = load.sleeper()
    one = await client.attach(Target(kind=TargetKind.TREE, id=os.getpid()), {"dry_run": True})
    assert child.pid in {held.tid for held in one.threads}
    later = load.sleeper()

    async def has_it() -> bool:
        return later.pid in {held.tid for held in (await client.list_attachments())[0].threads}

    await until(has_it, what="a process that began later")
    later.end()

    async def has_it_no_more() -> bool:
        return not await has_it()

    await until(has_it_no_more, what="and that ended")


@pytest.fixture
def limited() -> Iterator[Path]:
    """A cgroup that may use a fifth of a CPU, in whatever version the host has."""
    need_root()
    v1, v2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
    top = v1 if (v1 / "cpu.cfs_quota_us").exists() or (v1 / "tasks").exists() else v2
    group = top / f"eh-limited-{os.getpid()}"
    try:
        group.mkdir()
        file = "cpu.max" if (group / "cpu.max").exists() else "cpu.cfs_quota_us"
        (group / file).write_text("20000 100000" if file == "cpu.max" else "20000")
    except OSError as error:
        if group.exists():
            group.rmdir()
        missing(f"no limited cgroup here: {error}")
    yield group
    deadline = time.monotonic() + 20
    while group.exists():
        try:
            group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


async def test_the_quota_of_a_cgroup_above_is_kept_to(client: DeadlinedClient, limited: Path, load: Load) -> None:
    hogs = [load.hog(), load.hog()]
    for hog in hogs:
        (limited / "cgroup.procs").write_text(str(hog.pid))
    both = [await client.attach(process(hog.pid), policy(5)) for hog in hogs]

    async def kept() -> bool:
        now = [await first(client, one.id) for one in both]
        together = sum(held.budget_ns / held.period_ns for held in now)
        return 0.17 < together < 0.2001 and all("eh-limited" in held.reason for held in now)

    await until(kept, what="both together have the cgroup's fifth, and know why")
    for hog in hogs:
        hog.end()


async def test_the_document_is_served(client: DeadlinedClient, directory: Path) -> None:
    import aiohttp

    assert await client.list_attachments() == []
    connector = aiohttp.UnixConnector(path=str(directory / "api.sock"))
    async with aiohttp.ClientSession(connector=connector) as session:
        async with session.get("http://x/v1/openapi.json") as answer:
            assert json.loads(await answer.text())["openapi"].startswith("3.")
        async with session.put("http://x/v1/attachments") as answer:
            assert answer.status == 405
            assert "POST" in answer.headers["Allow"]
