"""AIVirt_VoSySMonitor_I001 by virsh: a real guest's life through virtvmand, believed by what the guest prints.

And what others do meanwhile: partitions that libvirt did not make, guests that end by themselves, a vmand that goes.
"""

import os
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from edgehold.api.vmand import Mode, State, wait_for_state
from edgehold.testing.capability import need_root
from edgehold.testing.partitions import PrivateVmand
from edgehold.testing.virtvmand import PrivateVirtvmand, private_virtvmand
from tests.libvirt.guest import POWER_OFF, UP, printed, silent, type_until
from tests.libvirt.virsh import CMDLINE, Virsh, definition, need_virsh, until

JOB = f"{CMDLINE} edgehold.job_ms=1 edgehold.period_ms=50"


@pytest_asyncio.fixture
async def daemon(vmand: PrivateVmand) -> AsyncIterator[PrivateVirtvmand]:
    """In front of the test's vmand; it must outlive the test."""
    need_virsh()
    need_root()
    async with private_virtvmand(vmand) as one:
        yield one
        assert one.running, one.log_text()[-3000:]
        assert "Traceback" not in one.log_text()


@pytest_asyncio.fixture
async def virsh(daemon: PrivateVirtvmand) -> Virsh:
    """With the socket's path in its URI."""
    return Virsh(daemon=daemon, home=daemon.directory)


def written(virsh: Virsh, text: str) -> Path:
    """A definition in a file."""
    path = virsh.home / "domain.xml"
    path.write_text(text)
    return path


def last_job(text: str) -> int:
    """The number of the last job whose line is whole."""
    return int(re.findall(r"edgehold-job n=(\d+) release_ms=\S+ response_ms=\S+\r\n", text)[-1])


async def test_the_life_of_a_guest(vmand: PrivateVmand, virsh: Virsh, image: tuple[Path, Path]) -> None:
    path = written(virsh, definition("machine", boot=image, cmdline=JOB))
    await virsh.did(f"define {path}")
    assert vmand.guests() == []
    await virsh.did("start machine")
    await printed(vmand, "machine", "edgehold-job n=3 ")
    (first,) = vmand.guests()

    await virsh.did("suspend machine")
    async with await vmand.client() as client:
        assert (await client.status("machine")).state is State.SUSPENDED
        await silent(client, "machine", seconds=1.0)
        before = last_job(await client.console("machine"))
    await virsh.did("resume machine")
    await printed(vmand, "machine", f"edgehold-job n={before + 5} ")
    assert vmand.guests() == [first]

    await virsh.did("reboot machine")
    assert POWER_OFF in await printed(vmand, "machine", UP, times=2)
    await until(virsh, "domstate machine", "^running$")
    await virsh.did("reset machine")
    assert (await printed(vmand, "machine", UP, times=3)).count(POWER_OFF) == 1

    await virsh.did("shutdown machine")
    await until(virsh, "domstate --reason machine", r"^shut off \(shutdown\)$")
    assert UP not in (await printed(vmand, "machine", POWER_OFF, times=2)).rpartition(POWER_OFF)[2]
    assert vmand.guests() == []

    await virsh.did("start machine")
    assert len(vmand.guests()) == 1
    await virsh.did("destroy machine")
    assert vmand.guests() == []
    assert await virsh.did("domstate --reason machine") == "shut off (destroyed)"
    await virsh.did("undefine machine")
    assert vmand.remains() == []

    await virsh.did(f"create {path}")
    await printed(vmand, "machine")
    await virsh.did("shutdown machine")
    await until(virsh, "list --all --name", r"\A\Z")
    assert vmand.remains() == []


async def test_partitions_of_vmanctl(vmand: PrivateVmand, virsh: Virsh, image: tuple[Path, Path]) -> None:
    """Both see what the other does."""
    async with await vmand.client() as client:
        one = await client.create_partition(cores=1, memsize_gb=0.125, mode=Mode.SHARED, name="ours")
        assert await virsh.did("list --all") == "Id Name State\n-----------------------\n- ours shut off"
        assert await virsh.did("domuuid ours") == (await client.status(one)).uuid
        assert "<memory unit='KiB'>131072</memory>" in (await virsh.did("dumpxml ours")).replace('"', "'")
        assert "mode='shared'" in (await virsh.did("metadata ours urn:edgehold:partition:1")).replace('"', "'")
        await client.deploy(one, kernel=image[0], initrd=image[1], cmdline=CMDLINE)
        assert await virsh.did(f"domname {one}") == "ours"
        assert await virsh.did("domstate ours") == "running"
        await virsh.did("suspend ours")
        assert (await client.status(one)).state is State.SUSPENDED
        await client.restore(one)
        assert await virsh.did("domstate ours") == "running"
        await virsh.did("destroy ours")
        assert (await client.status(one)).state is State.READY
        await virsh.did("undefine ours")
        assert await client.list_partitions() == []

        await virsh.did(f"define {written(virsh, definition('theirs', memory_mib=64))}")
        (theirs,) = await client.list_partitions()
        assert (theirs.name, theirs.state, theirs.cores, theirs.memory_bytes) == ("theirs", State.READY, 1, 64 << 20)
        assert await virsh.did("domuuid theirs") == theirs.uuid
        await client.deploy(theirs.id, kernel=image[0], initrd=image[1], cmdline=CMDLINE)
        assert await virsh.did("domstate theirs") == "running"
        await client.shutdown(theirs.id, force=True)
        assert await virsh.did("domstate theirs") == "shut off"
        await client.destroy_partition(theirs.id)
        assert await virsh.did("list --all --name") == ""


async def test_a_guest_that_ends_by_itself(vmand: PrivateVmand, virsh: Virsh, image: tuple[Path, Path]) -> None:
    path = written(virsh, definition("off", boot=image, cmdline=f"{CMDLINE} edgehold.shell=ttyS0"))
    await virsh.did(f"define {path}")
    await virsh.did("start off")
    await printed(vmand, "off")
    await type_until(vmand, "off", b"poweroff\n", POWER_OFF)
    await until(virsh, "domstate --reason off", r"^shut off \(shutdown\)$")
    await virsh.did("undefine off")

    await virsh.did(
        f"define {written(virsh, definition('panics', boot=image, cmdline=f'{CMDLINE} edgehold.panic_s=1'))}"
    )
    await virsh.did("start panics")
    await until(virsh, "domstate --reason panics", r"^shut off \(crashed\)$")
    assert await virsh.did("domid panics") == "-"
    # It can be started again as it is, and destroyed while it runs.
    await virsh.did("start panics")
    await virsh.did("destroy panics")
    await virsh.did("start panics")
    for pid in vmand.guests():
        os.kill(pid, signal.SIGKILL)
    await until(virsh, "domstate --reason panics", r"^shut off \(crashed\)$")
    await virsh.did("undefine panics")
    assert vmand.remains() == []

    await virsh.did(
        f"create {written(virsh, definition('brief', boot=image, cmdline=f'{CMDLINE} edgehold.panic_s=1'))}"
    )
    await until(virsh, "list --all --name", r"\A\Z")  # a transient one ends with its guest, however that ends
    assert vmand.remains() == []


async def test_a_vmand_that_goes_and_comes_back(vmand: PrivateVmand, virsh: Virsh, image: tuple[Path, Path]) -> None:
    """Nothing is claimed while nobody knows it; the guest is where it was."""
    await virsh.did(f"define {written(virsh, definition('stays', boot=image))}")
    await virsh.did("start stays")
    (pid,) = vmand.guests()
    number = await virsh.did("domid stays")
    await vmand.kill()
    done = await virsh("list", "--all")
    assert done.status == 1
    assert "vmand" in done.err
    await vmand.start()
    await until(virsh, "version", "Running hypervisor")
    assert await virsh.did("domid stays") == number
    assert await virsh.did("domstate stays") == "running"
    assert vmand.guests() == [pid]
    async with await vmand.client() as client:
        await client.suspend("stays")
        await wait_for_state(client, int(number), State.SUSPENDED, timeout_s=20)
    assert await virsh.did("domstate stays") == "paused"
