"""The arguments of the control socket's commands: types, ranges, and refusals that name the argument."""

import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edgehold.api.vmand import Disk, Mode, Nic
from edgehold.errors import BadRequestError

_AT = re.compile(r" - at `\$\.?(?P<key>[^`]*)`$")
_MAX_CORES = 4096

Which = Annotated[int, Meta(ge=1, le=2**63 - 1)] | Annotated[str, Meta(min_length=1, max_length=64)]
"""A partition: its id or its name."""
File = Annotated[str, Meta(min_length=1, max_length=4096)] | Annotated[int, Meta(ge=0, le=15)]
"""An absolute path, or which of the descriptors that came with the request."""
Timeout = Annotated[float, Meta(ge=0, le=3600)]


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Arguments of a command; what is not named is refused."""


class Nothing(Arguments, frozen=True, kw_only=True):
    """No arguments."""


class OfPartition(Arguments, frozen=True, kw_only=True):
    """Which one."""

    id: Which


class Create(Arguments, frozen=True, kw_only=True):
    """create-partition."""

    cores: Annotated[int, Meta(ge=1, le=_MAX_CORES)]
    memsize: Annotated[float, Meta(gt=0)]
    secure: bool = False
    mode: Mode = Mode.DEDICATED
    name: str = ""
    strict: bool = False
    uuid: str = ""
    annotations: dict[str, str] = {}


class Change(Arguments, frozen=True, kw_only=True):
    """change-partition: what is not given stays."""

    id: Which
    name: str | None = None
    cores: Annotated[int, Meta(ge=1, le=_MAX_CORES)] | None = None
    memsize: Annotated[float, Meta(gt=0)] | None = None
    secure: bool | None = None
    mode: Mode | None = None
    strict: bool | None = None
    annotations: dict[str, str | None] = {}


class Annotate(Arguments, frozen=True, kw_only=True):
    """annotate."""

    id: Which
    annotations: dict[str, str | None]


class Deploy(Arguments, frozen=True, kw_only=True):
    """deploy."""

    partition_id: Which
    kernel: File
    initrd: File | None = None
    dtb: File | None = None
    cmdline: str = ""
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    vsock: bool = False
    agent: bool = False
    paused: bool = False


class Reboot(Arguments, frozen=True, kw_only=True):
    """reboot."""

    id: Which
    graceful: bool = False
    timeout_s: Timeout | None = None
    wait: bool = True


class Shutdown(Arguments, frozen=True, kw_only=True):
    """shutdown."""

    id: Which
    timeout_s: Timeout | None = None
    force: bool = False
    leave: bool = False
    wait: bool = True


class Subscribe(Arguments, frozen=True, kw_only=True):
    """subscribe."""

    id: Which | None = None
    console: bool = False


def read(command: str, args: dict[str, Any], kind: type[Arguments]) -> Any:
    """The arguments as their type.

    Raises:
        BadRequestError: names the argument, what is wrong with it, and what the command takes.
    """
    try:
        return msgspec.convert(args, kind)
    except msgspec.ValidationError as error:
        text = str(error)
        at = _AT.search(text)
        where = f"{at['key']}: " if at and at["key"] else ""
        what = (text[: at.start()] if at else text).replace("`", "")
        raise BadRequestError(f"{command}: {where}{what}; it takes {_takes(kind)}") from None


def _takes(kind: type[Arguments]) -> str:
    fields = msgspec.structs.fields(kind)
    return ", ".join(f"{one.name}{'' if one.required else ' (optional)'}" for one in fields) or "no arguments"
