"""The control socket's commands: arguments checked against types, roles asked for, then handed to the service."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any

from edgehold.errors import BadRequestError, EdgeholdError
from edgehold.wire.control import Answer, Connection
from edgehold.wire.jsonlines import Request
from edgehold.wire.peer import Role, require
from edgehold.wire.stream import close_all, duplicates
from vmand import arguments, model
from vmand.arguments import Annotate, Arguments, Create, Deploy, Nothing, OfPartition, Reboot, Shutdown, Subscribe
from vmand.backend import Trait, opening
from vmand.change import Change, change_partition
from vmand.config import Config
from vmand.model import Record, plain
from vmand.service import Service

log = logging.getLogger(__name__)

COMMAND_ID = "0d5b1b0d6f0f4c53a4b7f3b0f5b7a9c1"
"""MESSAGE_ID of the line that each changing command leaves: who asked, and what came of it."""
_REFUSAL_S = 0.25
"""How long one who does not want to wait does so all the same once it has begun, to hear of a failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """Who asks, and what came with the request."""

    connection: Connection
    fds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Command:
    args: type[Arguments]
    role: Role
    run: Callable[[Any, _Call], Awaitable[Any]]


class Api:
    """The handler of a `ControlServer`."""

    def __init__(self, service: Service, *, config: Config, host_cores: int) -> None:
        self._service = service
        self._config = config
        self._host_cores = host_cores
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self._examining: asyncio.Task[Any] | None = None
        look, change = Role.READ, Role.OPERATE
        self.commands = {
            model.CREATE: _Command(Create, change, self._create),
            model.DEPLOY: _Command(Deploy, change, self._deploy),
            model.SUSPEND: _Command(OfPartition, change, self._suspend),
            model.RESTORE: _Command(OfPartition, change, self._restore),
            model.REBOOT: _Command(Reboot, change, self._reboot),
            model.SHUTDOWN: _Command(Shutdown, change, self._shutdown),
            model.DESTROY: _Command(OfPartition, change, self._destroy),
            model.CHANGE: _Command(arguments.Change, change, self._change),
            "annotate": _Command(Annotate, change, self._annotate),
            "annotations": _Command(OfPartition, look, self._annotations),
            "list": _Command(Nothing, look, self._list),
            "status": _Command(OfPartition, look, self._status),
            "vcpus": _Command(OfPartition, look, self._vcpus),
            "usage": _Command(OfPartition, look, self._usage),
            "console": _Command(OfPartition, look, self._console),
            "attach-console": _Command(OfPartition, change, self._attach_console),
            "capabilities": _Command(Nothing, look, self._capabilities),
            "doctor": _Command(Nothing, look, self._doctor),
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
            if request.fds and request.command != model.DEPLOY:
                raise BadRequestError(
                    f"{request.command}: it takes no descriptors, and {len(request.fds)} came with it"
                )
            args = arguments.read(request.command, request.args, command.args)
            if command.role is Role.READ:
                answer = await command.run(args, _Call(connection=connection, fds=()))
            else:
                # The caller may go away or vmand be told to stop: what was begun is brought to its end.
                call = _Call(connection=connection, fds=duplicates(request.fds))
                work = self._service.spawn(_run(command, args, call), f"{request.command} by {connection.peer}")
                work.add_done_callback(lambda _task: close_all(call.fds))
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
        # A refused request's arguments may be anything: only what can name a partition comes into the journal.
        partition = told if (type(told) is int and 0 < told < 2**63) or _is_name(told) else "-"
        fields = {
            "message_id": COMMAND_ID,
            "command": request.command,
            "partition": partition,
            "outcome": outcome,
            "peer_uid": connection.peer.uid,
            "peer_pid": connection.peer.pid,
        }
        log.info("%s %s by %s: %s", request.command, partition, connection.peer, plain(what), extra=fields)

    async def _create(self, args: Create, _call: _Call) -> dict[str, Any]:
        self._check_cores(args.cores)
        size = model.memory_bytes(args.memsize)
        record = await self._service.create(
            cores=args.cores,
            memory_bytes=size,
            mode=args.mode,
            name=args.name,
            secure=args.secure,
            strict=args.strict,
            own_uuid=args.uuid,
            annotations=args.annotations,
        )
        return {"id": record.id}

    async def _change(self, args: arguments.Change, _call: _Call) -> Any:
        self._check_cores(args.cores or 0)
        wanted = Change(
            name=args.name,
            cores=args.cores,
            memory_bytes=None if args.memsize is None else model.memory_bytes(args.memsize),
            mode=args.mode,
            secure=args.secure,
            strict=args.strict,
            annotations=args.annotations,
        )
        return (await change_partition(self._service, self._id(args.id), wanted)).public()

    def _check_cores(self, wanted: int) -> None:
        if wanted > self._host_cores:
            raise BadRequestError(f"cores: {wanted} are wanted and this host has {self._host_cores}")

    async def _annotate(self, args: Annotate, _call: _Call) -> dict[str, Any]:
        partition = self._id(args.id)
        self._service.annotate(partition, args.annotations)
        return {"id": partition}

    async def _annotations(self, args: OfPartition, call: _Call) -> dict[str, str]:
        # They are long: who asks for many at once would be cut off as one that does not read.
        await call.connection.drain()
        return self._service.annotations(self._id(args.id))

    async def _deploy(self, args: Deploy, call: _Call) -> dict[str, Any]:
        partition = self._id(args.partition_id)
        self._service.check(partition, model.DEPLOY)
        if args.disks or args.nics or args.vsock or args.agent:
            self._service.require(Trait.VIRTIO, "deploy: disks, nics, vsock and agent")
        if args.dtb is not None:
            self._service.require(Trait.DEVICE_TREE, "deploy: dtb")
        if args.paused:
            self._service.require(Trait.PAUSED, "deploy: paused")
        model.check_cmdline(args.cmdline)
        with opening.opened(args, fds=call.fds, peer=call.connection.peer, config=self._config) as images:
            return _state(await self._service.deploy(partition, images, paused=args.paused))

    async def _suspend(self, args: OfPartition, _call: _Call) -> dict[str, Any]:
        return _state(await self._service.suspend(self._id(args.id)))

    async def _restore(self, args: OfPartition, _call: _Call) -> dict[str, Any]:
        return _state(await self._service.restore(self._id(args.id)))

    async def _reboot(self, args: Reboot, _call: _Call) -> dict[str, Any]:
        partition = self._id(args.id)
        work = partial(self._service.reboot, partition, graceful=args.graceful, timeout_s=args.timeout_s)
        if args.wait:
            return _state(await work())
        self._service.book.refuse_if_busy(partition, model.REBOOT)
        return _state(await self._begun(work, partition, model.REBOOT))

    async def _shutdown(self, args: Shutdown, _call: _Call) -> dict[str, Any]:
        partition = self._id(args.id)
        work = partial(self._service.shutdown, partition, timeout_s=args.timeout_s, force=args.force, leave=args.leave)
        if args.wait:
            return _state(await work())
        if not args.force:  # which may hurry what is under way
            self._service.book.refuse_if_busy(partition, model.SHUTDOWN)
        return _state(await self._begun(work, partition, model.SHUTDOWN))

    async def _begun(self, work: Callable[..., Coroutine[Any, Any, Record]], partition: int, command: str) -> Record:
        """What a partition is a moment after a command got its turn; what becomes of it is in the journal."""
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task: asyncio.Task[Record] = self._service.spawn(
            work(begun=partial(begun.set_result, None)), f"{command} of partition {partition}, nobody waits for it"
        )
        either: set[asyncio.Future[Any]] = {task, begun}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({task}, timeout=_REFUSAL_S)
        if task.done():
            return await task
        task.add_done_callback(partial(_tell, partition, command))
        return self._service.record(partition)

    async def _destroy(self, args: OfPartition, _call: _Call) -> dict[str, Any]:
        return {"id": (await self._service.destroy(self._id(args.id))).id}

    async def _list(self, _args: Nothing, _call: _Call) -> Any:
        return self._service.partitions()

    async def _status(self, args: OfPartition, _call: _Call) -> Any:
        return self._service.status(self._id(args.id))

    async def _vcpus(self, args: OfPartition, _call: _Call) -> Any:
        return await self._service.vcpus(self._id(args.id))

    async def _usage(self, args: OfPartition, _call: _Call) -> Any:
        return await self._service.usage(self._id(args.id))

    async def _console(self, args: OfPartition, _call: _Call) -> dict[str, Any]:
        return {"text": self._service.console(self._id(args.id))}

    async def _attach_console(self, args: OfPartition, _call: _Call) -> Answer:
        stream = self._service.attach(self._id(args.id))
        return Answer({}, (stream.detach(),))

    async def _capabilities(self, _args: Nothing, _call: _Call) -> Any:
        return await self._service.capabilities()

    async def _doctor(self, _args: Nothing, _call: _Call) -> Any:
        # One for all who ask meanwhile: it reads much, and everybody may ask.
        if self._examining is None or self._examining.done():
            self._examining = self._service.spawn(self._service.backend.doctor(), "doctor")
        return await asyncio.shield(self._examining)

    def _id(self, which: int | str) -> int:
        return self._service.record(which).id

    async def _subscribe(self, args: Subscribe, call: _Call) -> dict[str, Any]:
        connection = call.connection
        partition = None if args.id is None else self._id(args.id)
        # The buffer as it is now: what follows comes as events, nothing is lost or doubled in between.
        text = self._service.console(partition) if partition is not None and args.console else ""
        if self._service.hub.subscribe(connection, partition, console=args.console):
            connection.on_close.append(lambda: self._service.hub.forget(connection))
        return {"text": text}


def _tell(partition: int, command: str, task: asyncio.Task[Record]) -> None:
    if not task.cancelled() and isinstance(error := task.exception(), EdgeholdError):
        log.warning("partition %d: %s: %s", partition, command, plain(error.message), extra={"partition": partition})


async def _run(command: _Command, args: Arguments, call: _Call) -> Any:
    return await command.run(args, call)


def _is_name(told: object) -> bool:
    return isinstance(told, str) and model.NAME.fullmatch(told) is not None


def _state(record: Record) -> dict[str, Any]:
    return {"id": record.id, "state": record.public().state.value}
