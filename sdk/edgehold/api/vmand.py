"""vmand's contract: partitions, their states, and the client that other tools use.

Commands, arguments and states are those of the vManager's internal API (NANCY D3.4 §3.2.1); what is ours beside them
(names, modes, devices, grades, annotations, list, status, vcpus, usage, console, events, doctor) only adds to it.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import msgspec

from edgehold.errors import BadRequestError, FailedError
from edgehold.wire.control import ControlClient
from edgehold.wire.stream import close_all

DEFAULT_SOCKET = Path("/run/vmand/control.sock")

Which = int | str
"""A partition: its id, or its name. A text of digits is an id."""
File = Path | int
"""A path, or an open descriptor."""


class State(StrEnum):
    """Where a partition is in its life."""

    READY = "READY"
    """Cores and memory are reserved; nothing runs."""
    DEPLOYED = "DEPLOYED"
    """The guest's CPUs run."""
    SUSPENDED = "SUSPENDED"
    """The guest's CPUs are stopped; its memory and cores are kept."""
    BUSY = "BUSY"
    """A command is under way; ``command`` says which. It ends in another state."""
    FAILED = "FAILED"
    """The guest's process died or the guest panicked; ``reason`` says how. ``shutdown`` makes it READY again."""


class Mode(StrEnum):
    """How a partition's virtual CPUs use cores."""

    DEDICATED = "dedicated"
    """Each vCPU is pinned to a core of its own; the kernel refuses SCHED_DEADLINE to a pinned thread (EPERM)."""
    SHARED = "shared"
    """vCPUs are not pinned; deadlined may hold each by a reservation."""


class CoresGrade(StrEnum):
    """How far a deployed guest's CPUs have their cores for themselves, best first. Read back from the kernel."""

    ISOLATED = "isolated"
    """An isolated cpuset partition (cgroup v2): no other task of the host may run there, and there is no balancing."""
    PINNED = "pinned"
    """Each vCPU is pinned to a core that no other partition gets; other tasks of the host may run there."""
    SHARED = "shared"
    """The vCPUs run wherever the host puts them."""


class MemoryGrade(StrEnum):
    """What a partition's memory is, best first."""

    HUGETLB = "hugetlb"
    """Huge pages, taken from the host's pool at create: never swapped, few TLB misses."""
    LOCKED = "locked"
    """Ordinary pages, allocated at create and never swapped."""
    PLAIN = "plain"
    """Ordinary pages, allocated at create; the host may swap them."""


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """A block device of a guest (virtio). ``path`` is absolute."""

    path: str
    format: Literal["raw", "qcow2"] = "raw"
    readonly: bool = False


class Nic(msgspec.Struct, frozen=True, kw_only=True):
    """A network interface of a guest (virtio): a tap in a bridge of the host."""

    bridge: str
    mac: str = ""
    """Empty: made from the partition's uuid, so that it stays the same."""


class Partition(msgspec.Struct, frozen=True, kw_only=True):
    """One partition as vmand sees it now."""

    id: int
    name: str
    uuid: str
    state: State
    mode: Mode
    cores: int
    memory_bytes: int
    secure: bool = False
    strict: bool = False
    """Deploy is refused where the cores can't be isolated."""
    command: str = ""
    """The command that is under way while the state is BUSY."""
    cpus: tuple[int, ...] = ()
    """The host's cores that are given to a dedicated partition."""
    node: int | None = None
    """The NUMA node of the cores; None for a shared partition."""
    cores_grade: CoresGrade | None = None
    """How dedicated the cores are; None where no guest runs."""
    cores_reason: str = ""
    """Why the grade is not a better one."""
    memory_grade: MemoryGrade | None = None
    memory_reason: str = ""
    """Why the grade is not a better one."""
    arch: str = ""
    """``x86_64`` or ``aarch64`` while a guest is deployed."""
    vsock_cid: int | None = None
    """The guest's address (vsock(7)) where it was deployed with vsock."""
    taps: tuple[str, ...] = ()
    """The guest's network interfaces as the host's are called, in their order, while a guest is deployed."""
    user: int | None = None
    """The uid of the guest's process, where there is one."""
    accelerator: str = ""
    """``kvm`` or ``tcg`` while a guest is deployed, with which its CPUs run."""
    pid: int | None = None
    """The guest's process, where there is one."""
    unit: str = ""
    """The transient systemd unit of the guest's process; empty where systemd does not run."""
    boot_count: int = 0
    reason: str = ""
    """Why it is FAILED, or what ended the guest."""
    last_output: str = ""
    """The last lines of the console of a guest that FAILED."""


class Vcpu(msgspec.Struct, frozen=True, kw_only=True):
    """One virtual CPU and the host's thread that runs it (``tid`` in the daemon's PID namespace)."""

    index: int
    tid: int


class DiskUse(msgspec.Struct, frozen=True, kw_only=True):
    """A guest's disk: what the guest did with it since its process started, and its sizes. None: it can't be told."""

    path: str
    """As it was given to deploy."""
    read_bytes: int | None = None
    read_requests: int | None = None
    written_bytes: int | None = None
    written_requests: int | None = None
    flushes: int | None = None
    capacity_bytes: int | None = None
    """What the guest sees."""
    allocated_bytes: int | None = None
    """What it takes of the host's storage; a block device is taken whole."""
    physical_bytes: int | None = None
    """How long the image's file is, or the block device."""


class NicUse(msgspec.Struct, frozen=True, kw_only=True):
    """A guest's network interface and what went through it since the deploy, as the guest sees it: ``rx`` came to it.

    None: it can't be told.
    """

    bridge: str
    mac: str
    interface: str
    """The tap on the host."""
    rx_bytes: int | None = None
    rx_packets: int | None = None
    rx_errors: int | None = None
    rx_drops: int | None = None
    tx_bytes: int | None = None
    tx_packets: int | None = None
    tx_errors: int | None = None
    tx_drops: int | None = None


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a guest's devices carry, in the order of its deploy."""

    disks: tuple[DiskUse, ...] = ()
    nics: tuple[NicUse, ...] = ()


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to a partition: ``kind`` is ``state``, ``grade``, ``annotated``, ``console`` or ``gone``."""

    kind: str
    partition: int
    time_s: float
    state: State | None = None
    reason: str = ""
    text: str = ""
    """Console output, as far as it is UTF-8."""
    cores_grade: CoresGrade | None = None
    memory_grade: MemoryGrade | None = None
    """``grade``: both as they are now; ``reason`` says what changed."""
    now: Partition | None = None
    """``state``, ``grade``, ``annotated``: the partition as it was when this happened."""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What this host can give, and why not where it can't."""

    accelerator: str
    accelerator_reason: str
    backend: str
    hypervisor: str = ""
    """What runs guests, with its version: ``QEMU 7.2.22``. Empty where it can't be told."""
    launcher: str
    """``systemd`` (a transient unit a guest) or ``process`` (a detached process)."""
    cores_grade: CoresGrade
    """The best grade that a dedicated partition's cores can have here."""
    cores_reason: str
    """Why it is not a better one."""
    memory_grade: MemoryGrade
    memory_reason: str
    supports: tuple[str, ...]
    """What the back end can: of ``suspend``, ``shutdown``, ``exit-events``, ``virtio``, ``secure``, ``console``,
    ``device-tree``, ``shared``, ``paused``."""
    archs: tuple[str, ...]
    """Guest architectures whose emulator or hypervisor is there."""
    cores_pool: tuple[int, ...]
    """Cores that dedicated partitions may be given; core 0 stays with Linux."""
    cores_free: tuple[int, ...]
    """Those of them that no partition has."""
    memory_total_bytes: int
    memory_free_bytes: int


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One finding of `VmandClient.doctor`."""

    subject: str
    """What was looked at, as a short name: ``cores``, ``memory``, ``kvm`` …"""
    level: Literal["good", "limited", "missing"]
    """``good``: as well as it can be. ``limited``: it works, less well. ``missing``: what needs it is refused."""
    found: str
    """What this host gives, and why not more."""
    cure: str = ""
    """What would change it: a setting, a package, a kernel command line. Empty where nothing would or need."""


class VmandClient:
    """An open conversation with vmand. ``async with await VmandClient.connect() as vmand: …``.

    Every method raises the `EdgeholdError` that vmand answered, or `UnavailableError` where vmand is away.
    """

    def __init__(self, control: ControlClient) -> None:
        self._control = control

    @classmethod
    async def connect(
        cls, path: Path = DEFAULT_SOCKET, *, timeout_s: float = 5.0, on_event: Callable[[Event], None] | None = None
    ) -> Self:
        """Connect to the control socket.

        ``on_event`` is called with each event as it comes, before an answer that came after it is returned to whoever
        waits for it; events then do not come from `events`.

        Raises:
            UnavailableError: nobody listens there, or this user may not open it.
        """
        if on_event is None:
            return cls(await ControlClient.connect(path, timeout_s=timeout_s))
        tell = on_event

        def hear(_name: str, data: Any) -> None:
            try:
                event = msgspec.convert(data, Event, strict=False)
            except msgspec.ValidationError as error:  # as any line that can't be read: it ends the conversation
                raise BadRequestError(f"the server's event can't be read: {error}") from None
            tell(event)

        return cls(await ControlClient.connect(path, timeout_s=timeout_s, on_event=hear))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the conversation; partitions are not touched."""
        await self._control.close()

    async def create_partition(
        self,
        *,
        cores: int,
        memsize_gb: float,
        secure: bool = False,
        mode: Mode = Mode.DEDICATED,
        name: str = "",
        strict: bool = False,
        uuid: str = "",
        annotations: Mapping[str, str] | None = None,
    ) -> int:
        """Reserve cores and memory (``memsize_gb`` in GiB, may be a fraction). Returns the partition's id, READY.

        ``strict`` refuses, here and at deploy, what can't have isolated cores. ``uuid``: this one instead of a random
        one; refused where another partition has it. ``annotations``: see `annotate`; written with the partition.
        """
        args: dict[str, Any] = {"cores": cores, "memsize": memsize_gb, "secure": secure, "mode": mode.value}
        if name:
            args["name"] = name
        if strict:
            args["strict"] = True
        if uuid:
            args["uuid"] = uuid
        if annotations:
            args["annotations"] = dict(annotations)
        return int(_field(await self._control.call("create-partition", args, timeout_s=60), "id"))

    async def change_partition(
        self,
        partition: Which,
        *,
        name: str | None = None,
        cores: int | None = None,
        memsize_gb: float | None = None,
        secure: bool | None = None,
        mode: Mode | None = None,
        strict: bool | None = None,
        annotations: Mapping[str, str | None] | None = None,
    ) -> Partition:
        """Give a READY partition another name or another share of the host; what is None stays. All of it or nothing.

        ``annotations``: as `annotate`, in the same step. Its uuid and id stay; its memory holds nothing afterwards.
        """
        given = {"name": name, "cores": cores, "memsize": memsize_gb, "secure": secure, "mode": mode, "strict": strict}
        args: dict[str, Any] = {"id": partition} | {key: one for key, one in given.items() if one is not None}
        if annotations:
            args["annotations"] = dict(annotations)
        answer = await self._control.call("change-partition", args, timeout_s=60)
        return msgspec.convert(answer, Partition, strict=False)

    async def annotate(self, partition: Which, annotations: Mapping[str, str | None]) -> None:
        """Keep texts with a partition, in any state, by key; None removes one. vmand does not read them.

        They live as long as the partition. At most 8 keys of 1 to 64 characters ``a-z 0-9 . _ -``, 96 KiB in all; more
        than fits into one request (64 KiB) comes with several.
        """
        await self._control.call("annotate", {"id": partition, "annotations": dict(annotations)})

    async def annotations(self, partition: Which) -> dict[str, str]:
        """What `annotate` keeps with a partition."""
        return msgspec.convert(await self._control.call("annotations", {"id": partition}), dict[str, str])

    async def deploy(
        self,
        partition: Which,
        *,
        kernel: File,
        initrd: File | None = None,
        dtb: File | None = None,
        cmdline: str = "",
        disks: Sequence[Disk] = (),
        nics: Sequence[Nic] = (),
        vsock: bool = False,
        agent: bool = False,
        paused: bool = False,
    ) -> None:
        """Load and start a guest in a READY partition; it is DEPLOYED when this returns.

        A `File` is an absolute path that vmand opens with this user's rights, or a descriptor that is open here.
        ``agent``: a virtio-serial port ``org.qemu.guest_agent.0``, on the host a socket in the partition's directory.
        ``paused``: load it and leave it SUSPENDED, before its first instruction; `restore` lets it begin.
        """
        args: dict[str, Any] = {"partition_id": partition}
        fds: list[int] = []
        for key, file in (("kernel", kernel), ("initrd", initrd), ("dtb", dtb)):
            if isinstance(file, int):
                args[key] = len(fds)
                fds.append(file)
            elif file is not None:
                args[key] = str(file)
        rest = {"cmdline": cmdline, "disks": disks, "nics": nics, "vsock": vsock, "agent": agent, "paused": paused}
        args |= {key: msgspec.to_builtins(one) for key, one in rest.items() if one}
        await self._control.call("deploy", args, timeout_s=60, fds=fds)

    async def suspend(self, partition: Which) -> None:
        """Stop the guest's CPUs; memory and cores are kept. DEPLOYED -> SUSPENDED."""
        await self._control.call("suspend", {"id": partition})

    async def restore(self, partition: Which) -> None:
        """Let a suspended guest's CPUs go on. SUSPENDED -> DEPLOYED."""
        await self._control.call("restore", {"id": partition})

    async def reboot(
        self, partition: Which, *, graceful: bool = False, timeout_s: float | None = None, wait: bool = True
    ) -> None:
        """Stop the CPUs by force, load the kernel again, start. DEPLOYED -> DEPLOYED.

        ``graceful``: the power button first, until the guest is off or ``timeout_s`` is over. ``wait`` False: return
        when it has begun; what becomes of it comes as events.

        Raises:
            BadStateError: the state does not allow it, or another command is under way and takes longer than 5 s;
                without ``wait`` also where it takes less. ``retryable`` tells the one from the other.
        """
        args: dict[str, Any] = {"id": partition}
        if graceful:
            args["graceful"] = True
        if not wait:
            args["wait"] = False
        await self._control.call("reboot", _with_timeout(args, timeout_s), timeout_s=_patience(timeout_s))

    async def shutdown(
        self,
        partition: Which,
        *,
        timeout_s: float | None = None,
        force: bool = False,
        leave: bool = False,
        wait: bool = True,
    ) -> None:
        """Press the power button until the guest is off or ``timeout_s`` is over, then by force. -> READY.

        ``force`` ends it at once, also where another shutdown is still waiting for the guest. ``leave`` never ends it
        by force: a guest that is not off in time goes on as it was, and that is a `TimedOutError`. ``wait`` False:
        return when it has begun; what becomes of it comes as events.

        Raises:
            BadStateError: as of `reboot`; ``force`` waits 5 s for another command, with or without ``wait``.
            TimedOutError: with ``leave``.
        """
        args: dict[str, Any] = {"id": partition}
        if force:
            args["force"] = True
        if leave:
            args["leave"] = True
        if not wait:
            args["wait"] = False
        await self._control.call("shutdown", _with_timeout(args, timeout_s), timeout_s=_patience(timeout_s))

    async def destroy_partition(self, partition: Which) -> None:
        """Give cores and memory back; the partition is gone. Refused while DEPLOYED."""
        await self._control.call("destroy-partition", {"id": partition}, timeout_s=60)

    async def list_partitions(self) -> list[Partition]:
        """All partitions, by id."""
        return msgspec.convert(await self._control.call("list"), list[Partition], strict=False)

    async def status(self, partition: Which) -> Partition:
        """One partition."""
        return msgspec.convert(await self._control.call("status", {"id": partition}), Partition, strict=False)

    async def vcpus(self, partition: Which) -> list[Vcpu]:
        """The threads that run the guest's CPUs; none where no guest is deployed."""
        return msgspec.convert(await self._control.call("vcpus", {"id": partition}), list[Vcpu])

    async def usage(self, partition: Which) -> Usage:
        """What the guest's disks and network interfaces carry; empty where no guest is deployed.

        Beside what all raise, `TimedOutError` where the guest's QEMU does not answer within 2 s.
        """
        return msgspec.convert(await self._control.call("usage", {"id": partition}), Usage)

    async def console(self, partition: Which) -> str:
        """The last console output that vmand holds (bounded)."""
        text = _field(await self._control.call("console", {"id": partition}), "text")
        return str(text)

    async def attach_console(self, partition: Which) -> socket.socket:
        """The guest's console as a stream: its last output, then what it prints; what is written is typed.

        The socket's end is the end of the guest or of vmand. Closing it touches nothing. It is blocking; the caller's.
        """
        _answer, fds = await self._control.call_with_fds("attach-console", {"id": partition})
        if len(fds) != 1:
            close_all(fds)
            raise FailedError(f"vmand sent {len(fds)} descriptors for one console")
        return socket.socket(fileno=fds[0])

    async def capabilities(self) -> Capabilities:
        """What this host can give."""
        return msgspec.convert(await self._control.call("capabilities", timeout_s=60), Capabilities, strict=False)

    async def doctor(self) -> list[Check]:
        """What this host gives and what it doesn't, why, and what would change it."""
        return msgspec.convert(await self._control.call("doctor", timeout_s=60), list[Check])

    async def subscribe(self, partition: Which | None = None, *, console: bool = False) -> str:
        """Ask for events of one or all partitions on this conversation; read them with `events`.

        Returns the console's last output where the console of one partition was asked for: what it prints after that
        comes as events, so nothing is lost or doubled between the two.
        """
        args: dict[str, Any] = {"console": console}
        if partition is not None:
            args["id"] = partition
        return str(_field(await self._control.call("subscribe", args), "text"))

    async def events(self) -> AsyncIterator[Event]:
        """Events as they come, after `subscribe`; ends with `UnavailableError` when vmand goes away."""
        async for _name, data in self._control.events():
            yield msgspec.convert(data, Event, strict=False)


def _with_timeout(args: dict[str, Any], timeout_s: float | None) -> dict[str, Any]:
    return args if timeout_s is None else args | {"timeout_s": timeout_s}


def _patience(timeout_s: float | None) -> float:
    """How long to wait for an answer that comes after the guest's own time: vmand's default is at most an hour."""
    return (3600 if timeout_s is None else timeout_s) + 60


def _field(answer: Any, key: str) -> Any:
    if not isinstance(answer, dict) or key not in answer:
        raise FailedError(f"vmand's answer has no {key!r}: {answer!r:.200}; are vmand and this tool of one version?")
    return answer[key]


async def wait_for_state(client: VmandClient, partition: int, state: State, *, timeout_s: float) -> Partition:
    """Wait until the partition is in the state. Uses the conversation's events: subscribes by itself.

    Raises:
        TimeoutError: it did not get there in time.
    """
    async with asyncio.timeout(timeout_s):
        await client.subscribe(partition)
        current = await client.status(partition)
        if current.state is state:
            return current
        async for event in client.events():
            if event.partition == partition and event.state is state:
                current = await client.status(partition)
                if current.state is state:  # an event may be older than this call
                    return current
        return current  # pragma: no cover - events() ends by raising
