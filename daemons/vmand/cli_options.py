"""What vmanctl's commands share: how partitions, disks and network interfaces are written, and asking vmand."""

import asyncio
import contextlib
import math
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
from click.shell_completion import CompletionItem

from edgehold.api.vmand import DEFAULT_SOCKET, Disk, Nic, Partition, VmandClient
from edgehold.cli import Output, progress, wait_for
from edgehold.errors import EdgeholdError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

_LARGEST_ID = 2**63 - 1
# A shell waits for this at each press of its key.
_COMPLETION_S = 1.0
# What can stand behind a disk's path; a comma inside the path is a part of it.
_DISK_OPTION = re.compile(r"(?P<path>.+),(?P<option>readonly|[a-z]+=[^,/]*)", re.DOTALL)
_FORMATS = ("raw", "qcow2")


# click.ParamType is generic only in newer versions than the oldest one that we take.
class PartitionType(click.ParamType):  # type: ignore[type-arg]
    """An id, or a name; which of the names there are, vmand knows."""

    name = "partition"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """A text of digits is an id."""
        text = str(value)
        if not text:
            self.fail("an id or a name is needed", param, ctx)
        if text.isascii() and text.isdigit() and int(text) <= _LARGEST_ID:
            return int(text)
        return text

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The partitions that there are; none where vmand can't be asked."""
        del param
        socket = ctx.find_root().params.get("socket") or DEFAULT_SOCKET
        try:
            found = asyncio.run(_partitions(socket))
        except (EdgeholdError, OSError, TimeoutError, msgspec.MsgspecError):
            return []
        told = [(one.name, f"{one.id} {one.state.value}") for one in found]
        if incomplete.isdigit():
            told += [(str(one.id), f"{one.name} {one.state.value}") for one in found]
        return [CompletionItem(value, help=text) for value, text in told if value.startswith(incomplete)]


async def _partitions(socket: Path) -> list[Partition]:
    async with asyncio.timeout(_COMPLETION_S):
        async with await VmandClient.connect(socket) as vmand:
            return await vmand.list_partitions()


class DiskType(click.ParamType):  # type: ignore[type-arg]
    """``PATH[,format=raw|qcow2][,readonly]``."""

    name = "disk"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Disk:
        """The path becomes absolute: vmand has another working directory."""
        if isinstance(value, Disk):
            return value
        path, given = str(value), {}
        while found := _DISK_OPTION.fullmatch(path):
            path = found["path"]
            key, _equals, what = found["option"].partition("=")
            if key not in {"format", "readonly"} or key in given:
                self.fail(f"{found['option']!r}: what can follow once is format=raw|qcow2 and readonly", param, ctx)
            given[key] = what
        if not path:
            self.fail("a path is needed", param, ctx)
        if (kind := given.get("format", "raw")) not in _FORMATS:
            self.fail(f"format={kind}: raw or qcow2", param, ctx)
        absolute = str(Path(path).resolve())
        return msgspec.convert({"path": absolute, "format": kind, "readonly": "readonly" in given}, Disk)


class NicType(click.ParamType):  # type: ignore[type-arg]
    """``BRIDGE[,mac=ADDRESS]``."""

    name = "nic"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Nic:
        """Which bridges are allowed and what an address looks like, vmand says."""
        if isinstance(value, Nic):
            return value
        bridge, comma, rest = str(value).partition(",")
        if not bridge or (comma and not rest.startswith("mac=")):
            self.fail(f"{value!r}: it is written BRIDGE or BRIDGE,mac=ADDRESS", param, ctx)
        return Nic(bridge=bridge, mac=rest.removeprefix("mac="))


class Number(click.FloatRange):
    """A range without what is no number: JSON has none of those, and vmand would see that nothing was given."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Refuses nan and infinity."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no number", param, ctx)
        return number


PARTITION = click.argument("partition", type=PartitionType())
PATH = click.Path(path_type=Path, resolve_path=True)
TIMEOUT_S = Number(0, 3600)
"""How long a guest may be waited for."""


def option(name: str, *more: str, **attributes: Any) -> Callable[[F], F]:
    """An option in both spellings, ``-name`` and ``--name``."""
    return click.option(f"-{name}", f"--{name}", *more, **attributes)


def options(*several: Callable[[F], F]) -> Callable[[F], F]:
    """Several options, in this order in the help."""

    def decorate(function: F) -> F:
        for one in reversed(several):
            function = one(function)
        return function

    return decorate


def ask(
    output: Output,
    work: Callable[[VmandClient], Awaitable[T]],
    *,
    doing: str = "",
    limit_s: float | None = None,
    interrupted: str = "",
) -> T:
    """Connect, and do the command's work. ``doing`` and ``limit_s``: see `edgehold.cli.progress`."""

    async def run() -> T:
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(progress(doing, limit_s=limit_s))
            return await work(await stack.enter_async_context(await VmandClient.connect(output.socket)))

    return wait_for(run(), interrupted=interrupted)
