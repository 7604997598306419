"""vmand is killed with -9: the guest goes on, the next vmand has it in hand, and nothing is doubled or left behind.

EDGEHOLD_KILL_ROUNDS (10): rounds with one guest that must live through all of them. EDGEHOLD_CUT_ROUNDS (190): kills at
random instants of random commands, in some of which a QEMU is killed as well (one in seven, at least 20 in all).
EDGEHOLD_SEED: the random numbers of a run that failed.
"""

import asyncio
import contextlib
import os
import random
import re
import signal
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from edgehold.api.vmand import Mode, Partition, State, VmandClient
from edgehold.errors import EdgeholdError, UnavailableError
from edgehold.testing.partitions import PrivateVmand, private_vmand

ROOT = Path(__file__).parents[2]
CMDLINE = "quiet no_timer_check tsc=reliable panic=-1"
JOB = f"{CMDLINE} edgehold.job_ms=1 edgehold.period_ms=20"
ROUNDS = int(os.environ.get("EDGEHOLD_KILL_ROUNDS", "10"))
CUTS = int(os.environ.get("EDGEHOLD_CUT_ROUNDS", "190"))


async def next_job(client: VmandClient, partition: int) -> int:
    """The number of a job that the guest prints from now on; `client` must listen to nothing else."""
    text = ""
    async with asyncio.timeout(60):
        await client.subscribe(partition, console=True)
        async for event in client.events():
            text += event.text
            # A whole line: after a reconnection the first may have lost its beginning.
            if found := re.search(r"edgehold-job n=(\d+) release_ms=\S+ response_ms=\S+\r\n", text):
                return int(found[1])
    raise AssertionError


@pytest.mark.slow
async def test_the_guest_goes_on_and_can_be_commanded(image: tuple[Path, Path]) -> None:
    async with private_vmand(settings={"accelerator": "tcg"}) as vmand:
        async with await vmand.client() as client:
            one = await client.create_partition(cores=1, memsize_gb=0.125, mode=Mode.SHARED)
        took: list[float] = []
        for number in range(ROUNDS):
            async with await vmand.client() as client:
                await client.deploy(one, kernel=image[0], initrd=image[1], cmdline=JOB)
                before = await client.status(one)
                job = await next_job(client, one)
            await vmand.kill()
            assert vmand.guests() == [before.pid]
            start = time.monotonic()
            await vmand.start()
            async with await vmand.client() as client:
                (now,) = await client.list_partitions()
                took.append(time.monotonic() - start)
                assert now == before, f"round {number}"
                assert await next_job(client, one) > job
            async with await vmand.client() as client:
                await client.suspend(one)
                await client.restore(one)
                await client.shutdown(one)
                assert (await client.status(one)).reason == ""
                assert (await client.status(one)).state is State.READY
            assert vmand.guests() == []
        sys.stdout.write(
            f"\n{ROUNDS} rounds; start to list: median {statistics.median(took):.3f} s, max {max(took):.3f} s\n"
        )


class Chaos:
    """Random commands on a few partitions, whatever their states."""

    def __init__(self, image: tuple[Path, Path], dice: random.Random) -> None:
        self._image = image
        self._dice = dice

    async def one(self, client: VmandClient) -> str:
        """One random command; refusals are as good as successes. What it was."""
        partitions = await client.list_partitions()
        target = self._dice.choice(partitions) if partitions else None
        name, call = self._pick(client, target, len(partitions))
        with contextlib.suppress(EdgeholdError):
            await call
        return name

    def _pick(self, client: VmandClient, target: Partition | None, count: int) -> tuple[str, Awaitable[object]]:
        kernel, initrd = self._image
        choices: list[tuple[str, Callable[[], Awaitable[object]]]] = []
        size = self._dice.choice([0.125, 0.25, 0.5])
        mode = self._dice.choice(list(Mode))
        if target is None or count < 3:
            choices.append(("create", lambda: client.create_partition(cores=1, memsize_gb=size, mode=mode)))
        if target is not None:
            one = target.id
            by_state: dict[State, list[tuple[str, Callable[[], Awaitable[object]]]]] = {
                State.READY: [
                    ("deploy", lambda: client.deploy(one, kernel=kernel, initrd=initrd, cmdline=CMDLINE)),
                    ("deploy", lambda: client.deploy(one, kernel=kernel, initrd=initrd, cmdline=CMDLINE)),
                    ("destroy", lambda: client.destroy_partition(one)),
                    ("change", lambda: client.change_partition(one, memsize_gb=size, mode=mode)),
                    ("paused", lambda: client.deploy(one, kernel=kernel, cmdline=CMDLINE, paused=True)),
                ],
                State.DEPLOYED: [
                    ("suspend", lambda: client.suspend(one)),
                    ("reboot", lambda: client.reboot(one)),
                    ("graceful", lambda: client.reboot(one, graceful=True, timeout_s=0.2)),
                    ("shutdown", lambda: client.shutdown(one, timeout_s=0.2)),
                    ("force", lambda: client.shutdown(one, force=True)),
                    ("leave", lambda: client.shutdown(one, timeout_s=0.2, leave=True)),
                ],
                State.SUSPENDED: [
                    ("restore", lambda: client.restore(one)),
                    ("shutdown", lambda: client.shutdown(one, timeout_s=0.1)),
                    ("leave", lambda: client.shutdown(one, timeout_s=0.1, leave=True)),
                    ("destroy", lambda: client.destroy_partition(one)),
                ],
                State.FAILED: [
                    ("shutdown", lambda: client.shutdown(one)),
                    ("destroy", lambda: client.destroy_partition(one)),
                ],
            }
            # What a command that was cut off left BUSY is tried all the same.
            choices += by_state.get(target.state, by_state[State.DEPLOYED])
        name, call = self._dice.choice(choices)
        return f"{name} {target and target.id}", call()


async def check_world(vmand: PrivateVmand, client: VmandClient) -> None:
    """Soon all is as `check_now` says: a QEMU that was killed with vmand may take a moment to end."""
    deadline = time.monotonic() + 20
    while True:
        try:
            await check_now(vmand, client)
        except AssertionError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)
        else:
            return


async def check_now(vmand: PrivateVmand, client: VmandClient) -> None:
    """Each partition has what its state needs, and there is nothing beside it."""
    partitions = await client.list_partitions()
    assert all(one.state is not State.BUSY for one in partitions), partitions
    live = [one for one in partitions if one.state in {State.DEPLOYED, State.SUSPENDED}]
    assert sorted(vmand.guests()) == sorted(one.pid or 0 for one in live), partitions
    assert sorted(vmand.of_users()) == sorted(one.pid or 0 for one in live if one.user is not None), partitions
    runs = vmand.runtime / "p"
    assert {one.name for one in runs.iterdir()} == {str(one.id) for one in live}
    memory = {one.name: one.stat() for one in vmand.memory.iterdir() if one.name != ".lock"}
    assert {name: stat.st_size for name, stat in memory.items()} == {
        f"{one.uuid}.mem": one.memory_bytes for one in partitions
    }
    assert all(stat.st_blocks * 512 == stat.st_size for stat in memory.values())
    for one in live:
        (vcpu,) = await client.vcpus(one.id)
        assert vcpu.tid > 0
    seen = await client.capabilities()
    assert set(seen.cores_free) == set(seen.cores_pool) - {cpu for one in partitions for cpu in one.cpus}
    # Its journal, listeners and this conversation; for each guest a process, a monitor and a console.
    assert len(os.listdir(f"/proc/{vmand.pid}/fd")) <= 24 + 4 * len(live)  # noqa: PTH208 - names are enough


def kill_a_guest(vmand: PrivateVmand, dice: random.Random) -> str:
    """kill -9 of one QEMU of this vmand's; each is verified while a pidfd holds it."""
    guests = vmand.guests()
    if not guests:
        return ""
    pid = dice.choice(guests)
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            if pid in vmand.guests():
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                return f"QEMU {pid} KILL"
        finally:
            os.close(fd)
    return ""


@pytest.mark.slow
async def test_killed_at_random_instants_of_random_commands(image: tuple[Path, Path]) -> None:
    seed = int(os.environ.get("EDGEHOLD_SEED", random.SystemRandom().randrange(10**6)))
    dice = random.Random(seed)  # noqa: S311 - a seed, to repeat a failure
    chaos = Chaos(image, dice)
    done: list[str] = []
    took: list[float] = []
    killed = 0
    try:
        async with private_vmand(settings={"accelerator": "tcg"}) as vmand:
            number = 0
            while number < CUTS or killed < min(20, CUTS // 7):
                number += 1
                assert number < 3 * CUTS, f"only {killed} QEMUs were there to be killed"
                async with await vmand.client() as client:
                    for _ in range(dice.randrange(3)):
                        done.append(await chaos.one(client))  # noqa: PERF401
                    last = asyncio.create_task(chaos.one(client))
                    await asyncio.sleep(dice.random() ** 2 * 0.1)  # the random instant itself
                    if dice.randrange(7) == 0 and (what := kill_a_guest(vmand, dice)):
                        killed += 1
                        done.append(what)
                        await asyncio.sleep(dice.choice([0, 0.02]))
                    await vmand.kill()
                    with contextlib.suppress(UnavailableError):
                        done.append(f"{await last} KILL")
                start = time.monotonic()
                await vmand.start()
                async with await vmand.client() as client:
                    await client.list_partitions()
                    took.append(time.monotonic() - start)
                    await check_world(vmand, client)
            sys.stdout.write(
                f"\n{number} kills and {killed} of QEMU, seed {seed}: {', '.join(done)}\n"
                f"start to list: median {statistics.median(took):.3f} s, max {max(took):.3f} s\n"
            )
        assert vmand.remains() == []
    except BaseException:
        sys.stdout.write(f"\nEDGEHOLD_SEED={seed}: {', '.join(done)}\n")
        raise
