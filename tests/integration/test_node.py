"""Both daemons together on a real guest: what neither can show alone, and the demo itself."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from edgehold.api.deadlined import Attachment, DeadlinedClient, Policy, Target, TargetKind, ThreadState
from edgehold.api.vmand import Mode, State, VmandClient
from edgehold.clock import NS_PER_MS
from edgehold.errors import DeniedError, NotFoundError
from edgehold.kernel import sched
from edgehold.testing.capability import guest_image, need_command, need_root
from edgehold.testing.daemons import Daemon
from edgehold.testing.load import capacity_stays
from edgehold.testing.partitions import PrivateVmand, private_vmand

ROOT = Path(__file__).parents[2]
CMDLINE = "quiet no_timer_check tsc=reliable panic=-1 edgehold.job_ms=10 edgehold.period_ms=100"
POLICY = Policy(initial_budget_ns=40 * NS_PER_MS)


@pytest.fixture
def image() -> tuple[Path, Path]:
    need_root()
    need_command("qemu-system-x86_64", "qemu-system-x86")
    return guest_image(ROOT)


@contextlib.asynccontextmanager
async def node() -> AsyncIterator[tuple[PrivateVmand, Daemon, DeadlinedClient]]:
    """vmand and a deadlined that asks it."""
    async with private_vmand(settings={"accelerator": "tcg"}) as vmand:
        directory = vmand.directory
        socket = directory / "dl.sock"
        deadlined = Daemon(
            "deadlined",
            directory=directory,
            settings={"socket": str(socket), "state_dir": str(directory / "dl"), "vmand_socket": str(vmand.socket)},
        )
        await deadlined.start()
        try:
            async with DeadlinedClient(socket) as client:
                yield vmand, deadlined, client
        finally:
            await deadlined.stop()


async def deploy(vmand: VmandClient, one: int, image: tuple[Path, Path]) -> int:
    """Start the guest. Returns its vCPU's thread."""
    await vmand.deploy(one, kernel=image[0], initrd=image[1], cmdline=CMDLINE)
    (vcpu,) = await vmand.vcpus(one)
    return vcpu.tid


async def until(ask: Callable[[], Awaitable[Attachment]], good: Callable[[Attachment], bool]) -> Attachment:
    """Ask until the answer is good; the last answer is told where it never is."""
    last: Attachment | None = None
    try:
        async with asyncio.timeout(20):
            while not good(last := await ask()):  # noqa: ASYNC110 - what is waited for happens in two daemons
                await asyncio.sleep(0.1)
    except TimeoutError:
        pytest.fail(f"never came true; last: {last}")
    assert last is not None
    return last


def held(one: Attachment, tid: int) -> bool:
    return [(thread.tid, thread.state) for thread in one.threads] == [(tid, ThreadState.HELD)]


async def test_a_reservation_outlives_vmand_and_follows_the_partition(image: tuple[Path, Path]) -> None:
    with capacity_stays():
        async with node() as (vmand, _deadlined, deadlined):
            async with await vmand.client() as client:
                one = await client.create_partition(cores=1, memsize_gb=0.25, mode=Mode.SHARED)
                first = await deploy(client, one, image)
            number = (await deadlined.attach(Target(kind=TargetKind.PARTITION, id=one), POLICY)).id

            async def ask() -> Attachment:
                return (await deadlined.attachment(number)).attachment

            await until(ask, lambda answer: held(answer, first) and answer.cycles > 1)
            await vmand.kill()
            gone = await until(ask, lambda answer: "vmand is away" in answer.reason)
            later = await until(ask, lambda answer: answer.cycles > gone.cycles + 2)
            assert held(later, first)
            assert sched.get(first).policy is sched.Policy.DEADLINE
            await vmand.start()
            await until(ask, lambda answer: held(answer, first) and not answer.reason)
            async with await vmand.client() as client:
                await client.shutdown(one)
                await until(ask, lambda answer: not answer.threads and "READY" in answer.reason)
                second = await deploy(client, one, image)
                await until(ask, lambda answer: held(answer, second))
                await client.shutdown(one, force=True)
                await client.destroy_partition(one)
                with pytest.raises(NotFoundError):
                    await until(ask, lambda _answer: False)
            assert await deadlined.list_attachments() == []


async def test_a_killed_deadlined_gives_the_guest_back(image: tuple[Path, Path]) -> None:
    with capacity_stays():
        async with node() as (vmand, deadlined, client):
            async with await vmand.client() as guests:
                one = await guests.create_partition(cores=1, memsize_gb=0.25, mode=Mode.SHARED)
                tid = await deploy(guests, one, image)
            await client.attach(Target(kind=TargetKind.PARTITION, id=one), POLICY)
            assert sched.get(tid).policy is sched.Policy.DEADLINE
            await deadlined.kill()
            assert sched.get(tid).policy is sched.Policy.DEADLINE
            await deadlined.start()
            assert sched.get(tid).policy is sched.Policy.OTHER
            async with await vmand.client() as guests:
                assert (await guests.status(one)).state is State.DEPLOYED


async def test_a_dedicated_partition_takes_no_reservation(image: tuple[Path, Path]) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: none can be given away")
    async with node() as (vmand, _deadlined, deadlined):
        async with await vmand.client() as client:
            one = await client.create_partition(cores=1, memsize_gb=0.25, mode=Mode.DEDICATED)
            await deploy(client, one, image)
        with pytest.raises(DeniedError, match=r"pinned.*Create it with mode shared"):
            await deadlined.attach(Target(kind=TargetKind.PARTITION, id=one), POLICY)


def demo(*, build: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({"EDGEHOLD_GUEST": str(build)} if build else {})
    return subprocess.run(
        [sys.executable, "-m", "demo"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip


@pytest.mark.usefixtures("image")
def test_the_demo_holds_and_draws() -> None:
    done = demo()
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr}"
    page = (ROOT / "build/demo/report.html").read_text()
    for text in ("<svg", "the budget fits the need", "nothing is left behind", "sched_rt_runtime_us"):
        assert text in page


def test_the_demo_names_the_condition_that_failed(tmp_path: Path, image: tuple[Path, Path]) -> None:
    """A guest whose kernel is cut short: the failed step is named, and what was begun is undone."""
    (tmp_path / "vmlinuz").write_bytes(image[0].read_bytes()[:1024])  # its header says that more follows
    (tmp_path / "initramfs.gz").write_bytes(image[1].read_bytes())
    done = demo(build=tmp_path)
    assert done.returncode == 1
    assert "condition failed: the next step: QEMU did not start" in done.stderr
    assert "nothing is left behind: no thread" in done.stdout


@pytest.mark.usefixtures("image")
def test_an_interrupted_demo_leaves_nothing() -> None:
    with capacity_stays():
        process = subprocess.Popen([sys.executable, "-m", "demo"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if "attach:" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        process.stdout.close()
        assert process.wait(60) == 130
        assert "nothing is left behind: no thread" in rest
