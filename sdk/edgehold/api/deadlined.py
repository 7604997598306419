"""deadlined's contract: what can be held by a reservation, how, and the client that other tools use.

A reservation is a budget every period: SCHED_DEADLINE's runtime and period (sched(7),
Documentation/scheduler/sched-deadline.rst), in nanoseconds. The rule that sizes the budget is that of NANCY D3.4 §4.
"""

from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Self

import msgspec

from edgehold.clock import NS_PER_MS
from edgehold.errors import DeniedError, EdgeholdError, UnavailableError, from_wire
from edgehold.kernel.limits import DL_MAX_PERIOD_NS, DL_MIN_PERIOD_NS, DL_MIN_RUNTIME_NS

if TYPE_CHECKING:
    import aiohttp

DEFAULT_SOCKET = Path("/run/deadlined/api.sock")


class TargetKind(StrEnum):
    """What an attachment holds."""

    THREAD = "thread"
    PROCESS = "process"
    """All threads of a process, new ones within a monitoring cycle."""
    PARTITION = "partition"
    """The vCPU threads of a vmand partition."""


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing to hold: a thread id, a process id or a partition's id."""

    kind: TargetKind
    id: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the budget is sized. All times in nanoseconds; see docs/deadlined.md for what each does."""

    period_ns: Annotated[int, msgspec.Meta(ge=DL_MIN_PERIOD_NS, le=DL_MAX_PERIOD_NS)] = 100 * NS_PER_MS
    initial_budget_ns: Annotated[int, msgspec.Meta(ge=DL_MIN_RUNTIME_NS, le=DL_MAX_PERIOD_NS)] = 10 * NS_PER_MS
    """Need not be accurate: the rule finds the need by itself."""
    overallocation: Annotated[float, msgspec.Meta(gt=0, le=4)] = 0.1
    """The share above the measured need (0.1: ten per cent): growth could never be seen without it."""
    window: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 5
    """How many samples the largest is taken of."""
    cap: Annotated[float, msgspec.Meta(gt=0, le=0.95)] = 0.8
    """The largest share of the period that one thread may be given."""
    min_budget_ns: Annotated[int, msgspec.Meta(ge=DL_MIN_RUNTIME_NS, le=DL_MAX_PERIOD_NS)] = 1 * NS_PER_MS
    """The floor: an idle thread keeps this much."""


class AttachRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of ``POST /v1/attachments``."""

    target: Target
    policy: Policy = Policy()


class ThreadState(StrEnum):
    """What deadlined does with one thread of an attachment."""

    HELD = "held"
    """It is in SCHED_DEADLINE with the budget shown."""
    WAITING = "waiting"
    """Not in SCHED_DEADLINE (yet): ``reason`` says why and what would change it; tried again by itself."""
    STUCK = "stuck"
    """The kernel left it throttled for ever; it was taken out and is attached again once that is safe."""


class ThreadStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One held thread. Times in nanoseconds; ``executed_ns`` and ``run_delay_ns`` are per period, of the last cycle."""

    tid: int
    name: str
    state: ThreadState
    budget_ns: int
    executed_ns: int
    run_delay_ns: int
    multiplier: int
    """The rule's ``l``: doubles while the need keeps growing."""
    reason: str = ""


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    """A target that deadlined holds."""

    id: int
    target: Target
    policy: Policy
    threads: tuple[ThreadStatus, ...] = ()
    cycles: int = 0
    reason: str = ""
    """Why the target has no threads at the moment, where it has none."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One monitoring cycle of one thread; ``time_ns`` is CLOCK_MONOTONIC at its end, the rest per period."""

    time_ns: int
    tid: int
    budget_ns: int
    """The budget that was set after this sample."""
    executed_ns: int
    run_delay_ns: int
    multiplier: int


class AttachmentDetail(msgspec.Struct, frozen=True, kw_only=True):
    """An attachment with its recent samples, oldest first."""

    attachment: Attachment
    history: tuple[Sample, ...] = ()


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """Admission bandwidth, in CPUs (1.0 is one whole core)."""

    cpus: int
    available: float
    """What the kernel would still admit, as a probe found it."""
    held: float
    """The sum of deadlined's own reservations."""
    resolution: float
    """The probe's step: differences below it say nothing."""
    monitor_policy: str
    """Under which scheduling policy deadlined itself runs, and why not a real-time one where it does not."""


class DeadlinedClient:
    """A client of deadlined's REST API over its unix socket; use as ``async with DeadlinedClient() as deadlined``.

    Every method raises the `EdgeholdError` that deadlined answered, or `UnavailableError` where it is away,
    or `DeniedError` where this user may not open the socket.
    """

    def __init__(self, socket: Path = DEFAULT_SOCKET, *, timeout_s: float = 15.0) -> None:
        self._socket = socket
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def attach(self, target: Target, policy: Policy | None = None) -> Attachment:
        """Hold a target from now on. Returns when its threads were tried once; see each thread's state.

        Raises:
            NotFoundError: no such thread, process or partition.
            BadStateError: it is attached already, or in SCHED_DEADLINE by somebody else.
            DeniedError: the kernel refuses (privilege, pinning); the text has the cure.
            NoCapacityError: not even the initial budget fits.
            UnavailableError: the partition's vmand is away.
        """
        request = AttachRequest(target=target, policy=policy or Policy())
        answer = await self._call("POST", "/v1/attachments", body=msgspec.json.encode(request))
        return msgspec.json.decode(answer, type=Attachment)

    async def detach(self, attachment: int) -> None:
        """Give every thread its own policy back and forget the target."""
        await self._call("DELETE", f"/v1/attachments/{attachment}")

    async def list_attachments(self) -> list[Attachment]:
        """All attachments, by id."""
        return msgspec.json.decode(await self._call("GET", "/v1/attachments"), type=list[Attachment])

    async def attachment(self, attachment: int, *, last: int | None = None) -> AttachmentDetail:
        """One attachment with its history: all of it, or the last samples."""
        query = "" if last is None else f"?last={last}"
        answer = await self._call("GET", f"/v1/attachments/{attachment}{query}")
        return msgspec.json.decode(answer, type=AttachmentDetail)

    async def capacity(self) -> Capacity:
        """Probe the admission bandwidth that is left, which takes all of it for some milliseconds.

        A result that is younger than a second is answered again.
        """
        return msgspec.json.decode(await self._call("GET", "/v1/capacity"), type=Capacity)

    async def _call(self, method: str, path: str, *, body: bytes | None = None) -> bytes:
        import aiohttp  # noqa: PLC0415 - costs 20 MB and a quarter of a second: only those who call pay

        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(path=str(self._socket)),
                timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            )
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            async with self._session.request(method, f"http://deadlined{path}", data=body, headers=headers) as response:
                answer = await response.read()
                status = response.status
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise _unreachable(self._socket, error) from error
        if status >= 400:
            raise from_wire(_decode_error(answer))
        return answer


def _unreachable(socket: Path, error: Exception) -> EdgeholdError:
    """Why there was no answer, in the words of the system and not of the library in between."""
    cause = getattr(error, "os_error", error)
    if isinstance(cause, PermissionError):
        return DeniedError(
            f"{socket}: {cause.strerror}; run it as root, or join a group that deadlined's settings give a role"
        )
    if isinstance(cause, TimeoutError):
        return UnavailableError(f"deadlined does not answer at {socket} in time")
    reason = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
    return UnavailableError(f"deadlined does not answer at {socket}: {reason}; is it running?")


def _decode_error(answer: bytes) -> object:
    try:
        return msgspec.json.decode(answer)
    except msgspec.DecodeError:
        return answer.decode(errors="replace")
