"""What several integration tests need of the host."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from edgehold.api.vmand import VmandClient
from edgehold.testing.capability import guest_image, missing, need_command
from edgehold.testing.load import Load, capacity_stays, deadline_refusal
from edgehold.testing.partitions import PrivateVmand, private_vmand

ROOT = Path(__file__).parents[2]


@pytest.fixture
def deadline() -> Iterator[None]:
    """SCHED_DEADLINE works here, and the test leaves the admission bandwidth as it found it."""
    if why := deadline_refusal():
        missing(f"no SCHED_DEADLINE here: {why}")
    with capacity_stays():
        yield


@pytest.fixture
def load() -> Iterator[Load]:
    """Threads to hold."""
    with Load() as one:
        yield one


@pytest.fixture
def image() -> tuple[Path, Path]:
    """Kernel and initial RAM disk of the small x86_64 guest, and the emulator that runs it."""
    need_command("qemu-system-x86_64", "qemu-system-x86")
    return guest_image(ROOT)


@pytest_asyncio.fixture
async def vmand() -> AsyncIterator[PrivateVmand]:
    """A vmand of the test's own, which must outlive it; no guest is left."""
    need_command("qemu-system-x86_64", "qemu-system-x86")
    async with private_vmand(settings={"accelerator": "tcg"}) as one:
        yield one
        assert one.running, one.log_text()[-3000:]
    assert one.guests() == one.of_users() == []


@pytest_asyncio.fixture
async def client(vmand: PrivateVmand) -> AsyncIterator[VmandClient]:
    """A conversation with it."""
    async with await vmand.client() as one:
        yield one
