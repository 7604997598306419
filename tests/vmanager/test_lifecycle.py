"""Partitions from their creation to their end, every verb in every state, and what guests do meanwhile."""

import contextlib
import errno
import os
import time
from collections.abc import Callable
from uuid import UUID

import pytest

from edgehold.kernel.vmanager import Cap, Flag, Info, Manager, PartitionHandle, State
from edgehold.testing.vmanager import MEMORY, PATIENCE_S, Device, eventually, make, need, refused, waiting


def test_create_gives_what_was_asked_for(manager: Manager, info: Info) -> None:
    need(info, Cap.KEEP)
    uuid = UUID(int=7)
    flags = Flag.KEEP
    created = manager.create(memory_bytes=MEMORY, cpus=(2, 5), partition=70000, uuid=uuid, name="a b~", flags=flags)
    handle = created.handle
    assert handle is not None
    with handle:
        status = handle.status()
        assert (created.id, created.cpus, handle.id) == (70000, (2, 5), 70000)
        assert (status.id, status.uuid, status.name, status.flags & ~Flag.DIRTY) == (70000, uuid, "a b~", flags)
        assert (status.state, status.cpus, status.memory_bytes) == (State.READY, (2, 5), MEMORY)
        assert status.memory_base == created.memory_base
        assert (status.boot_count, status.deployed_ns, status.generation, status.last_error) == (0, 0, 1, 0)
        assert not os.get_inheritable(handle.fileno())
        after = manager.info()
        assert (after.num_partitions, after.memory_free) == (1, info.memory_total - MEMORY)


def test_any_cores_and_any_id(manager: Manager, info: Info) -> None:
    flags = Flag.CPUS_ANY | Flag.NOFD
    first = manager.create(memory_bytes=MEMORY, count=2, flags=flags)
    second = manager.create(memory_bytes=MEMORY, count=len(info.cpus) - 2, flags=flags)
    assert first.handle is None
    assert first.id != second.id
    assert sorted(first.cpus + second.cpus) == sorted(info.cpus)
    with refused(errno.ENOSPC):
        manager.create(memory_bytes=MEMORY, count=1, flags=flags)


def test_what_is_taken(manager: Manager, info: Info) -> None:
    with make(manager, cpus=(1, 2), partition=5):
        with refused(errno.EEXIST):
            make(manager, cpus=(3,), partition=5)
        with refused(errno.EBUSY):
            make(manager, cpus=(2, 3))
        with refused(errno.ENOSPC):
            manager.create(memory_bytes=info.memory_total, cpus=(3,))
        assert manager.info().num_partitions == 1


def test_memory_is_whole_pieces(manager: Manager, info: Info) -> None:
    """The sum of what is free is no promise."""
    half = info.memory_total // 2
    for partition, size in ((1, MEMORY), (2, half), (3, half - MEMORY)):
        manager.create(memory_bytes=size, cpus=(partition,), partition=partition, flags=Flag.NOFD)
    assert manager.info().memory_free == 0
    manager.destroy(1)
    manager.destroy(3)
    with refused(errno.ENOSPC):
        manager.create(memory_bytes=half, cpus=(1,))
    make(manager).close()


def test_ids_are_listed_in_order_and_gone_ones_are_not(manager: Manager) -> None:
    for cpu, partition in ((1, 9), (2, 3), (3, 2**31 - 1)):
        make(manager, cpus=(cpu,), partition=partition).close()
    assert [manager.next(after) for after in (0, 3, 4, 9, 2**31 - 1)] == [3, 9, 9, 2**31 - 1, None]
    manager.destroy(9)
    assert manager.next(3) == 2**31 - 1
    for call in (manager.destroy, manager.open_partition):
        with refused(errno.ENOENT):
            call(9)


def test_who_keeps_a_partition(device: Device, manager: Manager, info: Info, kernel: int) -> None:
    """Without KEEP it ends with the open device that made it, whatever it does; with it only destroy ends it."""
    with Manager.open(device.path) as other:
        mine = make(other, partition=1)
        with contextlib.ExitStack() as stack:
            stack.enter_context(mine)
            duplicate = os.dup(other.fileno())
            stack.callback(os.close, duplicate)
            mine.deploy(kernel)
            if Cap.KEEP in info.caps:
                make(other, cpus=(2,), partition=2, flags=Flag.KEEP).close()
            other.close()
            assert mine.status().state is State.DEPLOYED, "a duplicate of the descriptor is still open"
    with contextlib.closing(mine):
        eventually(lambda: manager.next() != 1)
    assert manager.next() == (2 if Cap.KEEP in info.caps else None)


def test_a_handle_of_a_partition_that_is_gone(manager: Manager) -> None:
    with make(manager, partition=1) as old:
        manager.destroy(1)
        with make(manager, partition=1) as new:
            assert new.status().state is State.READY
            with refused(errno.ENODEV):
                old.status()
            with refused(errno.ENODEV):
                old.shutdown(force=True)


def test_a_partition_has_a_node(device: Device, manager: Manager, kernel: int) -> None:
    node = device.partition(12)
    with make(manager, partition=12):
        if device.kind == "module":
            assert node.stat().st_mode & 0o777 == 0o600
        with PartitionHandle(os.open(node, os.O_RDWR | os.O_CLOEXEC), 12) as handle:
            handle.deploy(kernel)
            assert handle.status().id == 12
            handle.shutdown(force=True)
    manager.destroy(12)
    with pytest.raises(FileNotFoundError):
        os.open(node, os.O_RDWR)


VERBS: dict[str, Callable[[Manager, PartitionHandle, int], object]] = {
    "deploy": lambda _manager, handle, kernel: handle.deploy(kernel),
    "suspend": lambda _manager, handle, _kernel: handle.suspend(),
    "restore": lambda _manager, handle, _kernel: handle.restore(),
    "reboot": lambda _manager, handle, _kernel: handle.reboot(),
    "shutdown": lambda _manager, handle, _kernel: handle.shutdown(),
    "force": lambda _manager, handle, _kernel: handle.shutdown(force=True),
    "scrub": lambda _manager, handle, _kernel: handle.scrub(),
    "destroy": lambda manager, handle, _kernel: manager.destroy(handle.id),
}
NEEDS: dict[str | State, tuple[Cap, ...]] = {
    "suspend": (Cap.SUSPEND,),
    "restore": (Cap.SUSPEND,),
    "reboot": (Cap.REBOOT,),
    "shutdown": (Cap.SHUTDOWN,),
    State.SUSPENDED: (Cap.SUSPEND,),
}
R, D, S, F, GONE = State.READY, State.DEPLOYED, State.SUSPENDED, State.FAILED, State.NONE
BUSY, BAD = errno.EBUSY, errno.EBADFD
TABLE: dict[str, dict[State, State | int]] = {
    # state before:   READY   DEPLOYED SUSPENDED BUSY    FAILED
    "deploy": {R: D, D: BUSY, S: BUSY, State.BUSY: BUSY, F: BUSY},
    "suspend": {R: BAD, D: S, S: BAD, State.BUSY: BUSY, F: BAD},
    "restore": {R: BAD, D: BAD, S: D, State.BUSY: BUSY, F: BAD},
    "reboot": {R: BAD, D: D, S: BAD, State.BUSY: BUSY, F: BAD},
    "shutdown": {R: BAD, D: R, S: BAD, State.BUSY: BUSY, F: R},
    "force": {R: BAD, D: R, S: R, State.BUSY: R, F: R},
    "scrub": {R: R, D: BAD, S: BAD, State.BUSY: BUSY, F: BAD},
    "destroy": {R: GONE, D: BUSY, S: BUSY, State.BUSY: BUSY, F: GONE},
}


def bring(handle: PartitionHandle, state: State, kernel: int, stack: contextlib.ExitStack) -> None:
    match state:
        case State.DEPLOYED:
            handle.deploy(kernel)
        case State.SUSPENDED:
            handle.deploy(kernel)
            handle.suspend()
        case State.BUSY:
            stack.enter_context(waiting(lambda: handle.deploy(kernel, cmdline="vman.hang")))
            eventually(lambda: handle.status().state is State.BUSY)
        case State.FAILED:
            with refused(errno.EIO):
                handle.deploy(kernel, cmdline="vman.refuse")
    assert handle.status().state is state


@pytest.mark.parametrize(("verb", "state"), [(verb, state) for verb, row in TABLE.items() for state in row])
def test_every_verb_in_every_state(manager: Manager, info: Info, kernel: int, verb: str, state: State) -> None:
    need(info, *NEEDS.get(verb, ()), *NEEDS.get(state, ()))
    expected = TABLE[verb][state]
    with make(manager) as handle, contextlib.ExitStack() as stack:
        bring(handle, state, kernel, stack)
        if state is State.BUSY and verb != "force":
            stack.callback(handle.shutdown, force=True)
        before = handle.status()
        if isinstance(expected, State):
            VERBS[verb](manager, handle, kernel)
        else:
            with refused(expected):
                VERBS[verb](manager, handle, kernel)
            assert handle.status() == before, "a refused call changed something"
        if expected is State.NONE:
            with refused(errno.ENODEV):
                handle.status()
        elif isinstance(expected, State):
            assert handle.status().state is expected


def test_what_the_firmware_can_t_do_is_refused(device: Device, manager: Manager, info: Info, kernel: int) -> None:
    lacks = ~info.caps
    for cap, flag in ((Cap.SECURE, Flag.SECURE), (Cap.KEEP, Flag.KEEP)):
        if cap in lacks:
            with refused(errno.EOPNOTSUPP):
                manager.create(memory_bytes=MEMORY, cpus=(1,), flags=flag)
    with make(manager) as handle:
        if Cap.GENDTB in lacks:
            with refused(errno.EOPNOTSUPP):
                handle.deploy(kernel, make_dtb=True)
        handle.deploy(kernel)
        for cap, verb in ((Cap.SUSPEND, "suspend"), (Cap.REBOOT, "reboot"), (Cap.SHUTDOWN, "shutdown")):
            if cap in lacks:
                with refused(errno.EOPNOTSUPP):
                    VERBS[verb](manager, handle, kernel)
        if Cap.EVENTS in lacks and device.kind == "module":
            with refused(errno.EOPNOTSUPP):
                manager.read_events()
        assert handle.status().state is State.DEPLOYED
        assert handle.shutdown(force=True) is State.READY


def test_what_the_firmware_refuses(manager: Manager, info: Info, kernel: int) -> None:
    with make(manager) as handle:
        with refused(errno.EIO):
            handle.deploy(kernel, cmdline="vman.refuse")
        status = handle.status()
        assert (status.state, status.last_error, status.fw_code) == (State.FAILED, errno.EIO, -6)
        assert handle.shutdown() is State.READY, "there is no guest to be asked: no CAP_SHUTDOWN needed"
        handle.deploy(kernel, cmdline="vman.refuse=2")
        status = handle.status()
        assert (status.last_error, status.fw_code) == (0, 0)
        if Cap.REBOOT in info.caps:
            with refused(errno.EIO):
                handle.reboot()
            assert (handle.status().state, handle.status().boot_count) == (State.FAILED, 1)


def test_a_firmware_that_does_not_answer(manager: Manager, kernel: int) -> None:
    with make(manager) as handle:
        with refused(errno.ETIMEDOUT):
            handle.deploy(kernel, cmdline="vman.hang", timeout_ms=50)
        assert (handle.status().state, handle.status().last_error) == (State.FAILED, errno.ETIMEDOUT)
        handle.shutdown(force=True)
        handle.deploy(kernel, cmdline="vman.start=50")
        assert handle.status().state is State.DEPLOYED


def test_force_ends_what_waits(manager: Manager, info: Info, kernel: int) -> None:
    with make(manager) as handle, manager.open_partition(handle.id) as other:
        with waiting(lambda: handle.deploy(kernel, cmdline="vman.hang")) as deploy:
            eventually(lambda: handle.status().state is State.BUSY)
            assert other.shutdown(force=True) is State.READY
        assert deploy == [errno.ECANCELED]
        need(info, Cap.SHUTDOWN, Cap.REBOOT)
        handle.deploy(kernel, cmdline="vman.deaf")
        with waiting(lambda: handle.shutdown(timeout_ms=600_000)) as shutdown:
            eventually(lambda: other.reboot() is State.DEPLOYED and bool(shutdown))  # until the other call has begun
        assert shutdown == [errno.ECANCELED]


def test_an_orderly_shutdown(manager: Manager, info: Info, kernel: int) -> None:
    need(info, Cap.SHUTDOWN)
    with make(manager) as handle:
        handle.deploy(kernel, cmdline="vman.obey=100")
        assert handle.shutdown(timeout_ms=PATIENCE_S * 1000) is State.READY
        handle.deploy(kernel, cmdline="vman.deaf")
        before = handle.status()
        with refused(errno.ETIMEDOUT):
            handle.shutdown(timeout_ms=50)
        after = handle.status()
        assert (after.state, after.generation) == (State.DEPLOYED, before.generation), "it goes on"
        assert after.last_error == errno.ETIMEDOUT
        with waiting(lambda: handle.shutdown(timeout_ms=600_000)) as result:
            eventually(lambda: handle.shutdown(force=True) is State.READY)
        assert result in ([0], [errno.EBADFD])  # the latter: force came first


def test_guests_that_end_by_themselves(manager: Manager, info: Info, kernel: int) -> None:
    with make(manager) as handle:
        handle.deploy(kernel, cmdline="console=x vman.off=50 quiet")
        eventually(lambda: handle.status().state is State.READY)
        assert handle.status().last_error == 0
        if Cap.REBOOT in info.caps:
            with refused(errno.EBADFD):
                handle.reboot()
            assert handle.reboot(also_off=True) is State.DEPLOYED
            assert handle.status().boot_count == 2
            eventually(lambda: handle.status().state is State.READY)
        handle.deploy(kernel, cmdline="vman.crash=50")
        eventually(lambda: handle.status().state is State.FAILED)
        assert handle.status().last_error == errno.ENOTRECOVERABLE


def test_a_suspended_guest_s_time_stands_still(manager: Manager, info: Info, kernel: int) -> None:
    need(info, Cap.SUSPEND)
    with make(manager) as handle:
        handle.deploy(kernel, cmdline="vman.off=600000")
        handle.suspend()
        generation = handle.status().generation
        time.sleep(0.1)
        assert (handle.status().state, handle.status().generation) == (State.SUSPENDED, generation)
        assert handle.restore() is State.DEPLOYED
        assert handle.shutdown(force=True) is State.READY


def test_memory_is_dirty_until_it_is_scrubbed(manager: Manager, info: Info, kernel: int) -> None:
    clears = Cap.CLEARS in info.caps
    with make(manager) as handle:
        handle.scrub()
        assert Flag.DIRTY not in handle.status().flags
        handle.deploy(kernel)
        assert Flag.DIRTY in handle.status().flags
        handle.shutdown(force=True)
    manager.destroy(handle.id)
    with make(manager) as handle:
        assert (Flag.DIRTY in handle.status().flags) is not clears, "the same memory, from somebody else"
        assert handle.scrub() is State.READY
        assert Flag.DIRTY not in handle.status().flags
        if Cap.REBOOT in info.caps:
            with refused(errno.EBADFD):
                handle.reboot(also_off=True)  # there are no images any more
