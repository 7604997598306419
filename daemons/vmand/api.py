"""The control socket's commands: arguments checked against types, roles asked for, then handed to the service."""

import asyncio
import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edgehold.api.vmand import Mode
from edgehold.errors import BadRequestError, EdgeholdError, UnsupportedError
from edgehold.wire.control import Connection
from edgehold.wire.jsonlines import Request
from edgehold.wire.peer import Role, require
from vmand import model
from vmand.backend import images
from vmand.model import Record
from vmand.service import Service

log = logging.getLogger(__name__)

COMMAND_ID = "0d5b1b0d6f0f4c53a4b7f3b0f5b7a9c1"
"""MESSAGE_ID of the line that each changing command leaves: who asked, and what came of it."""
_AT = re.compile(r" - at `\$\.?(?P<key>[^`]*)`$")
_MAX_CORES = 4096

Id = Annotated[int, Meta(ge=1, le=2**63 - 1)]


class _Args(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Arguments of a command; what is not named is refused."""


class Nothing(_Args, frozen=True, kw_only=True):
    """No arguments."""


class OfPartition(_Args, frozen=True, kw_only=True):
    """Which one."""

    id: Id


class Create(_Args, frozen=True, kw_only=True):
    """create-partition."""

    cores: Annotated[int, Meta(ge=1, le=_MAX_CORES)]
    memsize: Annotated[float, Meta(gt=0)]
    secure: bool = False
    mode: Mode = Mode.DEDICATED
    name: str = ""


class Deploy(_Args, frozen=True, kw_only=True):
    """deploy."""

    partition_id: Id
    kernel: str
    initrd: str = ""
    dtb: str = ""
    cmdline: str = ""


class Shutdown(_Args, frozen=True, kw_only=True):
    """shutdown."""

    id: Id
    timeout_s: Annotated[float, Meta(ge=0, le=3600)] | None = None
    force: bool = False


class Subscribe(_Args, frozen=True, kw_only=True):
    """subscribe."""

    id: Id | None = None
    console: bool = False


@dataclass(frozen=True, slots=True)
class _Command:
    args: type[_Args]
    role: Role
    run: Callable[[Any, Connection], Awaitable[Any]]


class Api:
    """The handler of a `ControlServer`."""

    def __init__(self, service: Service, *, image_limit_mib: int, host_cores: int) -> None:
        self._service = service
        self._image_limit_mib = image_limit_mib
        self._host_cores = host_cores
        self.outcomes: Counter[tuple[str, str]] = Counter()
        look, change = Role.READ, Role.OPERATE
        self.commands = {
            model.CREATE: _Command(Create, change, self._create),
            model.DEPLOY: _Command(Deploy, change, self._deploy),
            model.SUSPEND: _Command(OfPartition, change, self._suspend),
            model.RESTORE: _Command(OfPartition, change, self._restore),
            model.REBOOT: _Command(OfPartition, change, self._reboot),
            model.SHUTDOWN: _Command(Shutdown, change, self._shutdown),
            model.DESTROY: _Command(OfPartition, change, self._destroy),
            "list": _Command(Nothing, look, self._list),
            "status": _Command(OfPartition, look, self._status),
            "vcpus": _Command(OfPartition, look, self._vcpus),
            "console": _Command(OfPartition, look, self._console),
            "capabilities": _Command(Nothing, look, self._capabilities),
            "subscribe": _Command(Subscribe, look, self._subscribe),
        }

    async def handle(self, connection: Connection, request: Request) -> Any:
        """Carry out one request.

        Raises:
            EdgeholdError: what the caller is told.
        """
        command = self.commands.get(request.command)
        if command is None:
            raise BadRequestError(f"unknown command {request.command!r}; known: {', '.join(sorted(self.commands))}")
        outcome = "internal"
        try:
            require(connection.role, command.role, request.command)
            args = read_args(request.command, request.args, command.args)
            if command.role is Role.READ:
                answer = await command.run(args, connection)
            else:
                # The caller may go away or vmand be told to stop: what was begun is brought to its end.
                work = self._service.spawn(_run(command, args, connection), f"{request.command} by {connection.peer}")
                answer = await asyncio.shield(work)
        except EdgeholdError as error:
            outcome = error.code
            if command.role is not Role.READ and outcome != "bad-request":
                self._note(connection, request, f"refused: {error}", outcome, None)
            raise
        else:
            outcome = "done"
            if command.role is not Role.READ:
                self._note(connection, request, "done", outcome, answer)
            return answer
        finally:
            self.outcomes[request.command, outcome] += 1

    def _note(self, connection: Connection, request: Request, what: str, outcome: str, answer: Any) -> None:
        named = answer if isinstance(answer, dict) else request.args  # create-partition names it in its answer
        told = named.get("id", named.get("partition_id"))
        # A refused request's arguments may be anything: only what can be an id comes into the journal.
        partition = told if type(told) is int and 0 < told < 2**63 else "-"
        fields = {
            "message_id": COMMAND_ID,
            "command": request.command,
            "partition": partition,
            "outcome": outcome,
            "peer_uid": connection.peer.uid,
            "peer_pid": connection.peer.pid,
        }
        log.info("%s %s by %s: %s", request.command, partition, connection.peer, what, extra=fields)

    async def _create(self, args: Create, _connection: Connection) -> dict[str, Any]:
        if args.secure:
            raise UnsupportedError(
                "secure: this back end has no secure world to put a partition into; create it with secure false"
            )
        if args.cores > self._host_cores:
            raise BadRequestError(f"cores: {args.cores} are wanted and this host has {self._host_cores}")
        size = model.memory_bytes(args.memsize)
        record = await self._service.create(cores=args.cores, memory_bytes=size, mode=args.mode, name=args.name)
        return {"id": record.id}

    async def _deploy(self, args: Deploy, connection: Connection) -> dict[str, Any]:
        self._service.check(args.partition_id, model.DEPLOY)
        with images.opened(
            kernel=args.kernel,
            initrd=args.initrd,
            dtb=args.dtb,
            cmdline=args.cmdline,
            limit_mib=self._image_limit_mib,
            peer=connection.peer,
        ) as checked:
            return _state(await self._service.deploy(args.partition_id, checked))

    async def _suspend(self, args: OfPartition, _connection: Connection) -> dict[str, Any]:
        return _state(await self._service.suspend(args.id))

    async def _restore(self, args: OfPartition, _connection: Connection) -> dict[str, Any]:
        return _state(await self._service.restore(args.id))

    async def _reboot(self, args: OfPartition, _connection: Connection) -> dict[str, Any]:
        return _state(await self._service.reboot(args.id))

    async def _shutdown(self, args: Shutdown, _connection: Connection) -> dict[str, Any]:
        return _state(await self._service.shutdown(args.id, timeout_s=args.timeout_s, force=args.force))

    async def _destroy(self, args: OfPartition, _connection: Connection) -> dict[str, Any]:
        return {"id": (await self._service.destroy(args.id)).id}

    async def _list(self, _args: Nothing, _connection: Connection) -> Any:
        return self._service.partitions()

    async def _status(self, args: OfPartition, _connection: Connection) -> Any:
        return self._service.status(args.id)

    async def _vcpus(self, args: OfPartition, _connection: Connection) -> Any:
        return await self._service.vcpus(args.id)

    async def _console(self, args: OfPartition, _connection: Connection) -> dict[str, Any]:
        return {"text": self._service.console(args.id)}

    async def _capabilities(self, _args: Nothing, _connection: Connection) -> Any:
        return await self._service.capabilities()

    async def _subscribe(self, args: Subscribe, connection: Connection) -> dict[str, Any]:
        # The buffer as it is now: what follows comes as events, nothing is lost or doubled in between.
        text = self._service.console(args.id) if args.id is not None else ""
        if self._service.hub.subscribe(connection, args.id, console=args.console):
            connection.on_close.append(lambda: self._service.hub.forget(connection))
        return {"text": text if args.console else ""}


async def _run(command: _Command, args: _Args, connection: Connection) -> Any:
    return await command.run(args, connection)


def _state(record: Record) -> dict[str, Any]:
    return {"id": record.id, "state": record.state.value}


def read_args(command: str, args: dict[str, Any], kind: type[_Args]) -> Any:
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


def _takes(kind: type[_Args]) -> str:
    fields = msgspec.structs.fields(kind)
    return ", ".join(f"{one.name}{'' if one.required else ' (optional)'}" for one in fields) or "no arguments"
