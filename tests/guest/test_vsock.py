"""vsock on a kernel that has it: the rig's does, few hosts of tests do.

That a guest answers at its address is shown by tests/integration where the host has vsock: here it boots for minutes.
"""

import errno
import fcntl
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgehold.api.vmand import Mode
from edgehold.testing.capability import guest_image
from edgehold.testing.partitions import private_vmand
from vmand.backend import devices

REPO = Path(__file__).resolve().parents[2]
_VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60  # linux/vhost.h


@pytest.fixture
def vsock() -> Iterator[None]:
    subprocess.run(["modprobe", "vhost_vsock"], check=True)
    devices.check_vsock()
    yield
    subprocess.run(["modprobe", "-r", "vhost_vsock"], check=True)


def taken(cid: int) -> bool:
    """Whether a guest has this address now."""
    fd = os.open(devices.VHOST_VSOCK, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _VHOST_VSOCK_SET_GUEST_CID, struct.pack("Q", cid))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return True
    finally:
        os.close(fd)
    return False


@pytest.mark.usefixtures("vsock")
async def test_a_guest_has_its_address_until_it_ends() -> None:
    kernel, initrd = guest_image(REPO)
    # A guest inside the rig's: everything is emulated twice.
    patient = {"accelerator": "tcg", "qmp_timeout_s": 120.0, "start_timeout_s": 200.0}
    async with private_vmand(settings=patient) as vmand, await vmand.client() as client:
        partition = await client.create_partition(cores=1, memsize_gb=0.125, mode=Mode.SHARED)
        await client.deploy(partition, kernel=kernel, initrd=initrd, vsock=True)
        assert (await client.status(partition)).vsock_cid == devices.FIRST_CID
        assert taken(devices.FIRST_CID)
        assert not taken(devices.FIRST_CID + 1)
        await client.shutdown(partition, force=True)
        assert not taken(devices.FIRST_CID)
