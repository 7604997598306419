"""vmand's contract: partitions, their states, and the client that other tools use.

Commands, arguments and states are those of the vManager's internal API (NANCY D3.4 §3.2.1); what is ours beside them
(``name``, ``mode``, ``initrd``, ``cmdline``, list, status, vcpus, console, subscribe) only adds to it.
"""

import asyncio
from collections.abc import AsyncIterator
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from edgehold.errors import FailedError
from edgehold.wire.control import ControlClient

DEFAULT_SOCKET = Path("/run/vmand/control.sock")


class State(StrEnum):
    """Where a partition is in its life."""

    READY = "READY"
    """Cores and memory are reserved; nothing runs."""
    DEPLOYED = "DEPLOYED"
    """The guest's CPUs run."""
    SUSPENDED = "SUSPENDED"
    """The guest's CPUs are stopped; its memory and cores are kept."""
    FAILED = "FAILED"
    """The guest's process died or the guest panicked; ``reason`` says how. ``shutdown`` makes it READY again."""


class Mode(StrEnum):
    """How a partition's virtual CPUs use cores."""

    DEDICATED = "dedicated"
    """Each vCPU is pinned to a core of its own; the kernel refuses SCHED_DEADLINE to a pinned thread (EPERM)."""
    SHARED = "shared"
    """vCPUs are not pinned; deadlined may hold each by a reservation."""


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
    cpus: tuple[int, ...] = ()
    """The host's cores that are given to a dedicated partition."""
    accelerator: str = ""
    """``kvm`` or ``tcg`` while a guest is deployed, with which its CPUs run."""
    pid: int | None = None
    """The guest's process, where there is one."""
    unit: str = ""
    """The transient systemd unit of the guest's process; empty where systemd does not run."""
    boot_count: int = 0
    reason: str = ""
    """Why it is FAILED, or what ended the guest."""


class Vcpu(msgspec.Struct, frozen=True, kw_only=True):
    """One virtual CPU and the host's thread that runs it (``tid`` in the daemon's PID namespace)."""

    index: int
    tid: int


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to a partition; ``kind`` is ``state``, ``console`` or ``gone``."""

    kind: str
    partition: int
    time_s: float
    state: State | None = None
    reason: str = ""
    text: str = ""
    """Console output, as far as it is UTF-8."""


class Capabilities(msgspec.Struct, frozen=True, kw_only=True):
    """What this host can give, and why not where it can't."""

    accelerator: str
    accelerator_reason: str
    backend: str
    launcher: str
    """``systemd`` (a transient unit a guest) or ``process`` (a detached process)."""
    cores_pool: tuple[int, ...]
    """Cores that dedicated partitions may be given; core 0 stays with Linux."""
    cores_free: tuple[int, ...]
    """Those of them that no partition has."""
    memory_total_bytes: int
    memory_free_bytes: int


class VmandClient:
    """An open conversation with vmand. ``async with await VmandClient.connect() as vmand: …``.

    Every method raises the `EdgeholdError` that vmand answered, or `UnavailableError` where vmand is away.
    """

    def __init__(self, control: ControlClient) -> None:
        self._control = control

    @classmethod
    async def connect(cls, socket: Path = DEFAULT_SOCKET, *, timeout_s: float = 5.0) -> Self:
        """Connect to the control socket.

        Raises:
            UnavailableError: nobody listens there, or this user may not open it.
        """
        return cls(await ControlClient.connect(socket, timeout_s=timeout_s))

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
        self, *, cores: int, memsize_gb: float, secure: bool = False, mode: Mode = Mode.DEDICATED, name: str = ""
    ) -> int:
        """Reserve cores and memory (``memsize_gb`` in GiB, may be a fraction). Returns the partition's id, READY."""
        args: dict[str, Any] = {"cores": cores, "memsize": memsize_gb, "secure": secure, "mode": mode.value}
        if name:
            args["name"] = name
        return int(_field(await self._control.call("create-partition", args, timeout_s=60), "id"))

    async def deploy(
        self, partition: int, *, kernel: Path, initrd: Path | None = None, dtb: Path | None = None, cmdline: str = ""
    ) -> None:
        """Load and start a guest in a READY partition; it is DEPLOYED when this returns."""
        args: dict[str, Any] = {"partition_id": partition, "kernel": str(kernel)}
        if initrd is not None:
            args["initrd"] = str(initrd)
        if dtb is not None:
            args["dtb"] = str(dtb)
        if cmdline:
            args["cmdline"] = cmdline
        await self._control.call("deploy", args, timeout_s=60)

    async def suspend(self, partition: int) -> None:
        """Stop the guest's CPUs; memory and cores are kept. DEPLOYED -> SUSPENDED."""
        await self._control.call("suspend", {"id": partition})

    async def restore(self, partition: int) -> None:
        """Let a suspended guest's CPUs go on. SUSPENDED -> DEPLOYED."""
        await self._control.call("restore", {"id": partition})

    async def reboot(self, partition: int) -> None:
        """Stop the CPUs by force, load the kernel again, start. DEPLOYED -> DEPLOYED."""
        await self._control.call("reboot", {"id": partition})

    async def shutdown(self, partition: int, *, timeout_s: float | None = None, force: bool = False) -> None:
        """Press the power button until the guest is off or ``timeout_s`` is over, then by force. -> READY."""
        args: dict[str, Any] = {"id": partition}
        if timeout_s is not None:
            args["timeout_s"] = timeout_s
        if force:
            args["force"] = True
        await self._control.call("shutdown", args, timeout_s=(timeout_s or 60) + 30)

    async def destroy_partition(self, partition: int) -> None:
        """Give cores and memory back; the partition is gone. Refused while DEPLOYED."""
        await self._control.call("destroy-partition", {"id": partition}, timeout_s=60)

    async def list_partitions(self) -> list[Partition]:
        """All partitions, by id."""
        return msgspec.convert(await self._control.call("list"), list[Partition], strict=False)

    async def status(self, partition: int) -> Partition:
        """One partition."""
        return msgspec.convert(await self._control.call("status", {"id": partition}), Partition, strict=False)

    async def vcpus(self, partition: int) -> list[Vcpu]:
        """The threads that run the guest's CPUs; none where no guest is deployed."""
        return msgspec.convert(await self._control.call("vcpus", {"id": partition}), list[Vcpu])

    async def console(self, partition: int) -> str:
        """The last console output that vmand holds (bounded)."""
        text = _field(await self._control.call("console", {"id": partition}), "text")
        return str(text)

    async def capabilities(self) -> Capabilities:
        """What this host can give."""
        return msgspec.convert(await self._control.call("capabilities"), Capabilities, strict=False)

    async def subscribe(self, partition: int | None = None, *, console: bool = False) -> str:
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
