"""arm64 guests through a real vmand under emulation, with QEMU's own device tree, a caller's, and wrong ones."""

import asyncio
import gzip
import os
import re
import subprocess
from pathlib import Path

import pytest

from edgehold.api.vmand import Mode, State, VmandClient
from edgehold.errors import BadRequestError, UnsupportedError
from edgehold.testing.capability import guest_image, need_command
from edgehold.testing.devicetree import Tree, blob, cells, changed, texts, virt, wide
from edgehold.testing.partitions import PrivateVmand

ROOT = Path(__file__).parents[2]
BOOT_S = 120.0
QEMU = "qemu-system-aarch64"
CORES = 2
MEMORY_GB = 0.125
MEMORY = 128 << 20
CMDLINE = "quiet panic=-1"
UP = re.compile(r"edgehold-guest up kernel=\S+-arm64 uptime_s=\S+ cpus=2\r?\n")
JOB = re.compile(r"edgehold-job n=3 release_ms=300.000 response_ms=\d+\.\d{3}\r?\n")
TREE = virt(cores=CORES, memory_bytes=MEMORY)


@pytest.fixture
def image() -> tuple[Path, Path]:
    need_command(QEMU, "qemu-system-arm")
    return guest_image(ROOT, "arm64")


@pytest.fixture(scope="module")
def dumped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree that QEMU makes of such a machine, as a person would get it: 1 MiB, most of it slack."""
    qemu = need_command(QEMU, "qemu-system-arm")
    path = tmp_path_factory.mktemp("dtb") / "virt.dtb"
    argv = [qemu, "-nodefaults", "-display", "none", "-M", f"virt,gic-version=3,dumpdtb={path}", "-cpu", "cortex-a72"]
    argv += ["-accel", "tcg", "-smp", str(CORES), "-m", f"{MEMORY >> 20}M"]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    return path


async def create(client: VmandClient) -> int:
    return await client.create_partition(cores=CORES, memsize_gb=MEMORY_GB, mode=Mode.SHARED)


async def printed(vmand: PrivateVmand, partition: int, line: re.Pattern[str]) -> None:
    """Until the guest has printed the line, now or before. `UP`: from then on it reads its power button."""
    async with await vmand.client() as watcher:
        text = await watcher.subscribe(partition, console=True)
        try:
            async with asyncio.timeout(BOOT_S):
                if line.search(text):
                    return
                async for event in watcher.events():
                    text += event.text
                    if line.search(text):
                        return
        except TimeoutError:
            pytest.fail(f"not printed within {BOOT_S:g} s: {line.pattern}; the console's end:\n{text[-2000:]}")


async def test_a_life_with_the_tree_that_qemu_makes(
    vmand: PrivateVmand, client: VmandClient, image: tuple[Path, Path]
) -> None:
    one = await create(client)
    await client.deploy(one, kernel=image[0], initrd=image[1], cmdline=f"{CMDLINE} edgehold.job_ms=1")
    await printed(vmand, one, UP)
    await printed(vmand, one, JOB)
    status = await client.status(one)
    assert (status.state, status.arch, status.accelerator) == (State.DEPLOYED, "aarch64", "tcg")
    assert len(await client.vcpus(one)) == CORES

    await client.suspend(one)
    await client.restore(one)
    await client.reboot(one)
    await printed(vmand, one, UP)
    assert (await client.status(one)).boot_count == 2

    await client.shutdown(one, timeout_s=60)
    assert "edgehold-guest power-off" in await client.console(one)
    status = await client.status(one)
    assert (status.state, status.reason, status.arch) == (State.READY, "", "")
    await client.destroy_partition(one)
    assert vmand.remains() == []


async def test_trees_of_the_callers_own(
    vmand: PrivateVmand, client: VmandClient, image: tuple[Path, Path], dumped: Path, tmp_path: Path
) -> None:
    """QEMU's dump as it is, which QEMU itself could not load again; and the least tree, as a descriptor."""
    one, two = await create(client), await create(client)
    await client.deploy(one, kernel=image[0], initrd=image[1], dtb=dumped, cmdline=CMDLINE)

    least = tmp_path / "least.dtb"
    least.write_bytes(blob(TREE, version=16))
    packed = tmp_path / "Image.gz"
    packed.write_bytes(gzip.compress(image[0].read_bytes(), compresslevel=1))
    fd = os.open(least, os.O_RDONLY | os.O_CLOEXEC)
    try:
        await client.deploy(two, kernel=packed, initrd=image[1], dtb=fd, cmdline=CMDLINE)
    finally:
        os.close(fd)

    for partition in (one, two):
        await printed(vmand, partition, UP)
        await client.shutdown(partition, timeout_s=60)
        status = await client.status(partition)
        assert (status.state, status.reason) == (State.READY, "")
        assert "edgehold-guest power-off" in await client.console(partition)


WRONG: list[tuple[Tree | bytes, str]] = [
    (virt(cores=3, memory_bytes=MEMORY), "/cpus has 3 enabled cpu nodes; needed: 2"),
    (changed(TREE, "cpus/cpu@1/reg", cells(0x100)), "/cpus/cpu@1 has reg 0x100; needed: each of 0x0, 0x1"),
    (changed(TREE, "cpus/cpu@1/enable-method", texts("spin-table")), "has spin-table as enable-method; needed: psci"),
    (changed(TREE, "psci/method", texts("smc")), "/psci has smc as method; needed: hvc"),
    (changed(TREE, "psci", None), "there is no enabled node /psci"),
    (changed(TREE, "intc@8000000/compatible", texts("arm,gic-400")), "needed: one that is compatible with arm,gic-v3"),
    (
        changed(TREE, "intc@8000000/reg", wide(0x2F00_0000, 0x1_0000, 0x2F10_0000, 0x20_0000)),
        "at 0x2f000000, 0x2f100000; needed: 0x8000000 and 0x80a0000",
    ),
    (virt(cores=CORES, memory_bytes=2 * MEMORY), "0x10000000 bytes at 0x40000000; needed: 0x8000000 bytes"),
    (changed(TREE, "timer", None), "there is no timer"),
    (blob(TREE)[:-1], "it ends after"),
    (b"#!/bin/sh\n" * 9, "it begins with 23 21 2f 62"),
    (bytes((2 << 20) + 1), "larger than 2097152 bytes"),
]


async def test_wrong_trees_are_refused_each_for_its_own_reason(
    vmand: PrivateVmand, client: VmandClient, image: tuple[Path, Path], tmp_path: Path
) -> None:
    one = await create(client)
    path = tmp_path / "wrong.dtb"
    said = set()
    for tree, reason in WRONG:
        path.write_bytes(tree if isinstance(tree, bytes) else blob(tree))
        with pytest.raises(BadRequestError, match=f"^dtb: .*{reason}") as refusal:
            await client.deploy(one, kernel=image[0], initrd=image[1], dtb=path, cmdline=CMDLINE)
        said.add(str(refusal.value))
        assert (await client.status(one)).state is State.READY
    assert len(said) == len(WRONG)
    assert vmand.guests() == []


async def test_an_x86_kernel_takes_no_tree(client: VmandClient, image: tuple[Path, Path], dumped: Path) -> None:
    kernel, initrd = guest_image(ROOT)
    one = await create(client)
    with pytest.raises(UnsupportedError, match="dtb: an x86 guest takes no device tree"):
        await client.deploy(one, kernel=kernel, initrd=initrd, dtb=dumped)
    with pytest.raises(BadRequestError, match=r"kernel: .* looks like an initial RAM disk"):
        await client.deploy(one, kernel=image[1], initrd=image[0])
    assert (await client.status(one)).state is State.READY
