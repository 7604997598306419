"""A /dev/vmanager for the cases here: the seccomp double's, or the kernel module's in a machine of its own.

tests/integration/test_vmanager_double.py and _module.py run this directory inside one; elsewhere it is passed over.
"""

import os
from collections.abc import Iterator

import pytest

from edgehold.kernel.vmanager import Cap, Info, Manager
from edgehold.testing.vmanager import Device, clean, image


@pytest.fixture(autouse=True)
def device() -> Device:
    """The device of this process."""
    here = Device.here()
    if here is None:
        pytest.skip("there is no /dev/vmanager here; tests/integration/test_vmanager_* run this where there is one")
    return here


@pytest.fixture
def manager(device: Device) -> Iterator[Manager]:
    """The open device with no partition in it; afterwards there is none again, and nothing is lost."""
    with Manager.open(device.path) as one:
        clean(one)
        if Cap.EVENTS in one.info().caps:
            one.read_events()
        yield one
        clean(one)
        after = one.info()
        assert (after.num_partitions, after.memory_free) == (0, after.memory_total)


@pytest.fixture
def info(manager: Manager) -> Info:
    """What the firmware can do."""
    return manager.info()


@pytest.fixture
def kernel() -> Iterator[int]:
    """Something that looks like a kernel."""
    fd = image()
    yield fd
    os.close(fd)
