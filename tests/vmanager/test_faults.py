"""Any errno at any call, before or after it was carried out: what the double alone can do, as vmand's tests use it."""

import errno
from collections.abc import Callable, Iterator

import pytest

from edgehold.kernel.vmanager import Info, Manager, PartitionHandle, State
from edgehold.testing.vmanager import Device, eventually, make, refused, waiting


@pytest.fixture(autouse=True)
def only_the_double(device: Device) -> Iterator[None]:
    if device.kind != "double":
        pytest.skip("only the double can be made to fail")
    yield
    device.clear()


CALLS: dict[str, Callable[[Manager, PartitionHandle, int], object]] = {
    "GET_INFO": lambda manager, _handle, _kernel: manager.info(),
    "CREATE": lambda manager, _handle, _kernel: make(manager, cpus=(2,)),
    "DESTROY": lambda manager, handle, _kernel: manager.destroy(handle.id),
    "OPEN": lambda manager, handle, _kernel: manager.open_partition(handle.id),
    "NEXT": lambda manager, _handle, _kernel: manager.next(),
    "DEPLOY": lambda _manager, handle, kernel: handle.deploy(kernel),
    "SHUTDOWN": lambda _manager, handle, _kernel: handle.shutdown(),
    "REBOOT": lambda _manager, handle, _kernel: handle.reboot(),
    "SUSPEND": lambda _manager, handle, _kernel: handle.suspend(),
    "RESTORE": lambda _manager, handle, _kernel: handle.restore(),
    "STATUS": lambda _manager, handle, _kernel: handle.status(),
    "SCRUB": lambda _manager, handle, _kernel: handle.scrub(),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("number", [errno.EIO, errno.EINTR, errno.ENOMEM])
def test_every_call_fails_by_its_name(device: Device, manager: Manager, kernel: int, name: str, number: int) -> None:
    with make(manager) as handle:
        before = handle.status()
        device.fail(name, number)
        with refused(number):
            CALLS[name](manager, handle, kernel)
        assert device.calls()[-1] == (name, number)
        assert handle.status() == before, "it was carried out"


def test_open_fails_too(device: Device, manager: Manager) -> None:
    device.fail("open", errno.EACCES)
    with pytest.raises(PermissionError):
        Manager.open(device.path)
    Manager.open(device.path).close()
    assert manager.next() is None


def test_the_third_call_or_every_one(device: Device, manager: Manager) -> None:
    device.fail("NEXT", errno.EIO, at=3)
    assert [manager.next(), manager.next()] == [None, None]
    with refused(errno.EIO):
        manager.next()
    assert manager.next() is None
    device.fail("NEXT", errno.EIO, at=0)
    for _ in range(3):
        with refused(errno.EIO):
            manager.next()
    device.clear()
    assert manager.next() is None


def test_a_call_that_was_carried_out_and_fails(device: Device, manager: Manager, kernel: int) -> None:
    """As if the daemon had died before it got the answer."""
    device.fail("CREATE", errno.EIO, after=True)
    with refused(errno.EIO):
        make(manager, partition=3)
    assert manager.next() == 3
    with manager.open_partition(3) as handle:
        device.fail("DEPLOY", errno.EIO, after=True)
        with refused(errno.EIO):
            handle.deploy(kernel)
        assert (handle.status().state, handle.status().boot_count) == (State.DEPLOYED, 1)


def test_a_call_that_hangs(device: Device, manager: Manager, info: Info) -> None:
    """Others go on meanwhile, and it ends when it is let go."""
    with make(manager) as handle:
        device.hang("STATUS")
        with waiting(handle.status) as result:
            eventually(lambda: manager.info() != info)
            assert manager.next() == handle.id

            def let_go() -> bool:
                device.clear()
                return bool(result)

            eventually(let_go)
        assert result == [errno.EIO]
        assert handle.status().state is State.READY
