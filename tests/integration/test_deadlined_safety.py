"""What the real daemon leaves behind, whoever ends first: bandwidth, policies, stuck threads.

The numbers are small enough for continuous integration; EDGEHOLD_SAFETY=full takes those of `tests.bench.safety`, where
the procedures are. That no bandwidth is lost is also checked after each test (the fixture ``deadline``).
"""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgehold.api.deadlined import DeadlinedClient, ThreadState
from edgehold.errors import EdgeholdError
from edgehold.kernel import capacity, procfs, sched
from edgehold.kernel.sched import Flag, Policy
from edgehold.testing.daemons import Daemon
from edgehold.testing.load import Load, eventually
from tests.bench import safety
from tests.integration.deadlined_house import (  # noqa: F401 - fixtures
    client,
    daemon,
    directory,
    policy,
    process,
    thread,
    until,
)

FULL = os.environ.get("EDGEHOLD_SAFETY") == "full"
PATIENCE_S = 60.0
LOST_PERCENT = 100 * 2 * capacity.RESOLUTION
"""What the probe can't tell from nothing."""

# Says its id; after a line on its standard input it forks, starts a thread and a command, says their policies, and
# becomes another program, which sleeps until its standard input ends.
_FORKS = """
import os, subprocess, sys, threading
print(threading.get_native_id(), flush=True)
sys.stdin.readline()
thread = threading.Thread(target=lambda: print(os.sched_getscheduler(0), flush=True))
thread.start(); thread.join()
if (pid := os.fork()) == 0:
    print(os.sched_getscheduler(0), flush=True); os._exit(0)
os.waitpid(pid, 0)
subprocess.run([sys.executable, "-Sc", "import os; print(os.sched_getscheduler(0))"], check=True)
os.execvp("cat", ["cat"])
"""


pytestmark = pytest.mark.usefixtures("deadline")


async def test_sleepers_in_and_out_leave_the_capacity_as_it_was(client: DeadlinedClient, load: Load) -> None:
    found = await safety.sleepers(client, load, threads=100 if FULL else 30, rounds=10 if FULL else 4)
    assert found.capacity.lost_percent < LOST_PERCENT, found


async def test_hogs_that_are_attached_again_while_throttled_execute(
    daemon: Daemon,
    client: DeadlinedClient,
) -> None:
    found = await safety.throttled(daemon, client, number=50 if FULL else 10, rounds=10 if FULL else 4)
    # On a busy machine the watchdog may take for stuck who is only late, and does no harm by it.
    assert found.stuck == 0, found
    assert found.capacity.lost_percent < LOST_PERCENT, found


async def test_after_every_kill_everybody_gets_back_what_he_had(
    daemon: Daemon,
    directory: Path,
    load: Load,
) -> None:
    number = 100 if FULL else 24
    found = await safety.killed(daemon, directory / "api.sock", load, threads=number, kills=50 if FULL else 4)
    assert found.held > number  # those of two kills, and what the others had begun
    assert found.wrong == 0, found
    assert found.capacity.lost_percent < LOST_PERCENT, found


async def test_stopping_in_the_middle_of_attaching_restores_everybody(
    daemon: Daemon,
    client: DeadlinedClient,
    load: Load,
) -> None:
    child = load.sleeper()
    tids = [child.thread() for _ in range(60)]
    own = {tid: sched.get(tid) for tid in tids}

    async def attach_all(some: list[int]) -> None:
        with contextlib.suppress(EdgeholdError):  # it says that it stops, or is gone
            for tid in some:
                await client.attach(thread(tid), policy(1))

    bursts = [asyncio.create_task(attach_all(tids[first::3])) for first in range(3)]
    while safety.in_deadline(tids) < 20:  # noqa: ASYNC110 - the kernel does not tell
        await asyncio.sleep(0)
    assert await daemon.stop() == 0
    await asyncio.gather(*bursts)
    assert {tid: sched.get(tid) for tid in tids} == own


async def test_targets_that_end_while_they_are_held_take_nothing_with_them(
    daemon: Daemon,
    client: DeadlinedClient,
    load: Load,
) -> None:
    child, spinning = load.sleeper(), load.hog()
    for _ in range(29):
        child.thread()
    one = await client.attach(process(child.pid), policy(1))
    assert len(one.threads) == 30
    await client.attach(thread(spinning.pid), policy(5, cap=0.05))
    child.end()
    spinning.end()  # killed while throttled, most likely: it ends once it has budget again

    async def over() -> bool:
        return await client.list_attachments() == []

    await until(over, timeout_s=PATIENCE_S, what="both attachments ended with their processes")
    assert not [line for line in daemon.log_text().splitlines() if " WARNING " in line or " ERROR " in line]


@pytest.fixture
def forking() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", _FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as one:
        yield one
        one.kill()


async def test_who_is_held_may_fork_start_threads_and_become_another_program(
    client: DeadlinedClient,
    forking: subprocess.Popen[str],
) -> None:
    assert forking.stdin is not None
    assert forking.stdout is not None
    pid = int(forking.stdout.readline())
    own = sched.get(pid)
    one = await client.attach(thread(pid), policy(50))
    assert one.threads[0].state is ThreadState.HELD
    forking.stdin.write("go\n")
    forking.stdin.flush()
    said = [await asyncio.to_thread(forking.stdout.readline) for _ in range(3)]
    assert [line.strip() for line in said] == [str(int(Policy.OTHER))] * 3

    def is_cat() -> bool:
        return procfs.stat(pid).name == "cat"

    await asyncio.to_thread(eventually, is_cat, timeout_s=PATIENCE_S, what="it is another program")
    now = sched.get(pid)
    assert (now.policy, now.flags) == (Policy.DEADLINE, Flag.RESET_ON_FORK)
    cycles = (await client.attachment(one.id)).attachment.cycles

    async def looked() -> bool:
        return (await client.attachment(one.id)).attachment.cycles > cycles + 2

    await until(looked, timeout_s=PATIENCE_S, what="some cycles later")
    assert (await client.attachment(one.id)).attachment.threads[0].state is ThreadState.HELD
    await client.detach(one.id)
    assert sched.get(pid) == own
