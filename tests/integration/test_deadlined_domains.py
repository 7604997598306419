"""The vCPU threads of libvirt's domains: a private libvirtd with real QEMU guests, its deaths and its silence."""

import asyncio
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from deadlined import domainask
from deadlined.domains import DomainSource, LibvirtLink
from deadlined.partitions import PartitionSource, VmandLink
from edgehold.api.deadlined import Attachment, DeadlinedClient, Target, TargetKind, ThreadState
from edgehold.api.vmand import Mode, VmandClient
from edgehold.errors import (
    NotFoundError,
    UnavailableError,
)
from edgehold.kernel import procfs, sched
from edgehold.kernel.sched import SchedAttr
from edgehold.testing.capability import guest_image, need_command, need_open_root, need_root
from edgehold.testing.daemons import Daemon, private_directory
from edgehold.testing.load import eventually
from edgehold.testing.partitions import PrivateVmand
from edgehold.testing.virtvmand import private_virtvmand
from tests.bench.libvirt import Libvirt, private_libvirt
from tests.libvirt.python import need_libvirt_python

ROOT = Path(__file__).parents[2]
NOBODY = 65534
# No disk and no kernel: its firmware looks for one, and that is work enough.
DOMAIN = """<domain type='qemu'>
  <name>{name}</name><uuid>{uuid}</uuid><memory unit='MiB'>64</memory><vcpu>2</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices><controller type='usb' model='none'/><memballoon model='none'/></devices>
</domain>
"""


@pytest_asyncio.fixture
async def libvirt() -> AsyncIterator[Libvirt]:
    """Both daemons; a test ends its own guests."""
    need_root()
    need_open_root()  # libvirt looks at QEMU as another user
    need_libvirt_python()
    guest_image(ROOT)
    for program, package in (("libvirtd", "libvirt-daemon-system"), ("qemu-system-x86_64", "qemu-system-x86")):
        need_command(program, package)
    async with private_libvirt() as one:
        yield one


@contextlib.asynccontextmanager
async def defined(libvirt: Libvirt, name: str) -> AsyncIterator[str]:
    """A domain that is shut off; its uuid."""
    named = str(uuid.uuid4())
    definition = libvirt.directory / f"{name}.xml"
    definition.write_text(DOMAIN.format(name=name, uuid=named))
    await libvirt.virsh("define", str(definition))
    try:
        yield named
    finally:
        with contextlib.suppress(RuntimeError):  # it is off already
            await libvirt.virsh("destroy", name)
        with contextlib.suppress(RuntimeError):
            await libvirt.virsh("undefine", name)


@contextlib.asynccontextmanager
async def linked(vmand_socket: Path = Path("/nowhere"), *, answer_s: float = 60.0) -> AsyncIterator[LibvirtLink]:
    """A link that keeps its sources up to date."""
    link = LibvirtLink(VmandLink(vmand_socket), vmand_socket=vmand_socket, answer_s=answer_s)
    task = asyncio.create_task(link.run())
    try:
        yield link
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def opened(link: LibvirtLink, name: str, uri: str) -> DomainSource:
    source = await link.open(name, uri)
    assert isinstance(source, DomainSource)
    return source


async def until(condition: Callable[[], bool], *, what: Callable[[], object], timeout_s: float = 60.0) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - the other side is another process
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s:g} s: {what()}") from None


def names(tids: tuple[int, ...]) -> list[str]:
    return sorted(procfs.stat(tid).name for tid in tids)


def command_line(tid: int) -> bytes:
    return Path(f"/proc/{procfs.process_of(tid)}/cmdline").read_bytes()


@contextlib.contextmanager
def child(uri: str, *, script: Path = domainask._SCRIPT, prefix: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """The script that asks libvirt."""
    argv = [*prefix, domainask._SYSTEM_PYTHON, "-I", str(script), uri]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/") as one:
        yield one


def asked(one: subprocess.Popen[str]) -> dict[str, Any]:
    assert one.stdin is not None
    assert one.stdout is not None
    one.stdin.write('["one"]\n')
    one.stdin.flush()
    answer: dict[str, Any] = json.loads(one.stdout.readline())
    return answer


@contextlib.contextmanager
def impostor(named: str) -> Iterator[int]:
    """A process with QEMU's words and a thread with a vCPU's name; its pid."""
    words = ["qemu", "-name", "guest=one,debug-threads=on", "-uuid", named]
    script = "open('/proc/self/comm', 'w').write('CPU 0/TCG'); input()"
    with subprocess.Popen([sys.executable, "-c", script, *words], stdin=subprocess.PIPE) as one:
        eventually(lambda: procfs.stat(one.pid).name == "CPU 0/TCG", timeout_s=30, what="it has its name")
        yield one.pid


async def test_a_domain_starts_pauses_and_starts_again(libvirt: Libvirt) -> None:
    async with defined(libvirt, "one") as named, defined(libvirt, "other"), linked() as link:
        await libvirt.virsh("start", "other")
        source = await opened(link, "one", libvirt.uri)
        by_uuid = await opened(link, named.upper(), libvirt.uri)
        assert source.tids() == ()
        assert (source.reason, source.suspended, source.over) == ("the domain is shut off; no vCPU runs", False, "")

        def two() -> bool:
            return len(source.tids()) == 2 and not source.reason

        await libvirt.virsh("start", "one")
        await until(two, what=lambda: source.reason)
        first = source.tids()
        assert names(first) == ["CPU 0/TCG", "CPU 1/TCG"]
        assert all(named.encode() in command_line(tid) for tid in first)
        assert source.reason == ""
        await until(lambda: by_uuid.tids() == first, what=by_uuid.tids)

        assert not source.changed()
        await libvirt.virsh("suspend", "one")
        await until(lambda: source.suspended, what=lambda: source.reason)
        assert source.reason == "the domain is paused"
        assert source.tids() == first
        await libvirt.virsh("resume", "one")
        await until(lambda: not source.suspended, what=lambda: source.reason)
        assert not source.changed()

        await libvirt.virsh("destroy", "one")
        await until(lambda: source.changed() and not source.tids(), what=source.tids)
        await until(lambda: source.reason == "the domain is shut off; no vCPU runs", what=lambda: source.reason)
        await libvirt.virsh("start", "one")
        await until(two, what=lambda: source.reason)
        assert not set(source.tids()) & set(first)

        await libvirt.virsh("destroy", "one")
        await libvirt.virsh("undefine", "one")
        await until(lambda: "knows no domain one any more" in source.reason, what=lambda: source.reason)
        assert (source.tids(), source.over) == ((), "")
        for one in (source, by_uuid):
            one.close()


@pytest.mark.usefixtures("deadline")
async def test_the_daemon_holds_a_domain_and_lets_it_go_while_it_stands(libvirt: Libvirt) -> None:
    with private_directory() as directory:
        socket = directory / "api.sock"
        settings = {"socket": str(socket), "state_dir": str(directory / "state"), "cycle_ms": 200}
        daemon = Daemon("deadlined", directory=directory, settings=settings)
        target = Target(kind=TargetKind.DOMAIN, name="one", uri=libvirt.uri)
        async with defined(libvirt, "one"), DeadlinedClient(socket, timeout_s=60) as client:
            await daemon.start()
            try:
                with pytest.raises(NotFoundError, match="has no domain nobody"):
                    await client.attach(Target(kind=TargetKind.DOMAIN, name="nobody", uri=libvirt.uri))
                number = (await client.attach(target)).id
                await libvirt.virsh("start", "one")
                one = await seen(client, number, lambda one: held(one) == 2 and not one.suspended)
                tids = [thread.tid for thread in one.threads]
                assert all(sched.get(tid).policy is sched.Policy.DEADLINE for tid in tids)
                await libvirt.virsh("suspend", "one")
                floor = one.policy.min_budget_ns
                await seen(
                    client, number,
                    lambda one: one.suspended and [thread.budget_ns for thread in one.threads] == [floor] * 2,
                )  # fmt: skip
                await libvirt.virsh("resume", "one")
                await seen(client, number, lambda one: not one.suspended and held(one) == 2)
                await libvirt.virsh("destroy", "one")
                await seen(client, number, lambda one: not one.threads and "is shut off" in one.reason)
                # As after a start of the host: by its name, which lasts.
                assert await daemon.stop() == 0
                await daemon.start()
                await libvirt.virsh("start", "one")
                again = await seen(client, number, lambda one: held(one) == 2)
                tids = [thread.tid for thread in again.threads]
                await client.detach(number)
                assert all(sched.without_slice(sched.get(tid)) == SchedAttr() for tid in tids)
            finally:
                assert await daemon.stop() == 0
                assert "Traceback" not in daemon.log_text()


def held(one: Attachment) -> int:
    return sum(thread.state is ThreadState.HELD for thread in one.threads)


async def seen(client: DeadlinedClient, number: int, right: Callable[[Attachment], bool]) -> Attachment:
    """The attachment once it is as it should be."""
    one = (await client.attachment(number)).attachment
    try:
        async with asyncio.timeout(60.0):
            while not right(one):
                await asyncio.sleep(0.05)
                one = (await client.attachment(number)).attachment
    except TimeoutError:
        raise AssertionError(f"not within 60 s: {one}") from None
    return one


async def test_threads_stay_known_while_libvirtd_is_away_or_hangs(libvirt: Libvirt) -> None:
    async with defined(libvirt, "one"), linked(answer_s=5.0) as link:
        await libvirt.virsh("start", "one")
        source = await opened(link, "one", libvirt.uri)
        await until(lambda: len(source.tids()) == 2, what=lambda: source.reason)
        first = source.tids()

        libvirt.kill_libvirtd()
        await until(lambda: "last known threads are kept" in source.reason, what=lambda: source.reason)
        assert source.tids() == first
        with pytest.raises(UnavailableError, match="is libvirt's daemon running"):
            await link.open("one", libvirt.uri)
        libvirt.start_libvirtd()
        await until(lambda: not source.reason, what=lambda: source.reason)
        assert source.tids() == first

        libvirt.signal_libvirtd(signal.SIGSTOP)
        try:
            await until(lambda: "does not answer within 5 s" in source.reason, what=lambda: source.reason)
            with pytest.raises(UnavailableError, match="does not answer within 5 s"):
                await link.open("one", libvirt.uri)
            assert source.tids() == first
        finally:
            libvirt.signal_libvirtd(signal.SIGCONT)
        await until(lambda: not source.reason, what=lambda: source.reason)
        assert source.tids() == first
        source.close()


async def test_who_only_says_that_he_is_the_guest_is_not_held(libvirt: Libvirt) -> None:
    async with defined(libvirt, "one") as named, linked() as link:
        with impostor(named) as liar:
            source = await opened(link, "one", libvirt.uri)
            assert source.tids() == ()
            await libvirt.virsh("start", "one")
            await until(lambda: len(source.tids()) == 2, what=lambda: source.reason)
            assert liar not in source.tids()
            source.close()


async def test_what_libvirt_does_not_have_or_let_is_refused(libvirt: Libvirt) -> None:
    async with linked() as link:
        with pytest.raises(NotFoundError, match="has no domain nobody"):
            await link.open("nobody", libvirt.uri)
        with pytest.raises(NotFoundError):
            await link.open(str(uuid.uuid4()), libvirt.uri)
        with pytest.raises(UnavailableError, match="is libvirt's daemon running"):
            await link.open("one", f"qemu:///system?socket={libvirt.directory}/nobody-listens")
    # Another user's child is refused by the socket's mode.
    with private_directory() as directory:
        directory.chmod(0o755)
        script = Path(shutil.copy(domainask._SCRIPT, directory))
        drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        with child(libvirt.uri, script=script, prefix=drop) as one:
            error = asked(one)["error"]
        assert (error["code"], error["retryable"]) == ("denied", False), error
        assert f"uid {NOBODY} needs access" in error["message"]


async def test_the_child_ends_with_its_parent_though_libvirt_hangs(libvirt: Libvirt) -> None:
    with child(libvirt.uri) as one:
        assert asked(one) == {"domains": {"one": {"known": False}}}
        assert one.stdin is not None
        libvirt.signal_libvirtd(signal.SIGSTOP)
        try:
            one.stdin.write('["one"]\n')
            one.stdin.close()
            assert one.wait(30) == 0
        finally:
            libvirt.signal_libvirtd(signal.SIGCONT)


async def test_a_partitions_domain_becomes_the_partitions_source(vmand: PrivateVmand, client: VmandClient) -> None:
    need_root()
    need_libvirt_python()
    number = await client.create_partition(cores=1, memsize_gb=0.0625, mode=Mode.SHARED, name="blue")
    one = next(one for one in await client.list_partitions() if one.id == number)
    async with private_virtvmand(vmand) as daemon, linked(vmand.socket) as link:
        for name in ("blue", one.uuid):
            source = await link.open(name, daemon.read_only_uri)
            assert isinstance(source, PartitionSource)
            assert (source.partition, source.tids()) == (one.id, ())
            source.close()
        with pytest.raises(NotFoundError):
            await link.open("red", daemon.read_only_uri)
