"""deadlined's contract: what can be held by a reservation, how, and the client that other tools use.

A reservation is a budget every period: SCHED_DEADLINE's runtime and period (sched(7),
Documentation/scheduler/sched-deadline.rst), in nanoseconds. A group of threads can have one too: cpu.max of a cgroup
(Documentation/admin-guide/cgroup-v2.rst). The reference rule that sizes budgets is that of NANCY D3.4 §4.
"""

from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import msgspec

from edgehold import vendor
from edgehold.clock import NS_PER_MS
from edgehold.errors import DeniedError, EdgeholdError, UnavailableError, from_wire
from edgehold.kernel.limits import DL_MAX_PERIOD_NS, DL_MIN_PERIOD_NS, DL_MIN_RUNTIME_NS

if TYPE_CHECKING:
    import aiohttp

DEFAULT_SOCKET = Path("/run/deadlined/api.sock")
DEFAULT_URI = "qemu:///system"
WINDOW_MAX = 64
"""The largest `Policy.window`."""


class TargetKind(StrEnum):
    """What an attachment holds."""

    THREAD = "thread"
    PROCESS = "process"
    """All threads of a process, new ones within a monitoring cycle."""
    TREE = "tree"
    """A process, its descendants and all their threads."""
    PARTITION = "partition"
    """The vCPU threads of a vmand partition."""
    UNIT = "unit"
    """The threads in the cgroup of a systemd unit, and below it."""
    CGROUP = "cgroup"
    """The threads in a cgroup, and below it: a container."""
    DOMAIN = "domain"
    """The vCPU threads of a libvirt domain of this host."""


_BY_ID = frozenset({TargetKind.THREAD, TargetKind.PROCESS, TargetKind.TREE, TargetKind.PARTITION})
GROUPS = frozenset({TargetKind.UNIT, TargetKind.CGROUP})
"""Kinds that a cgroup's own limit can hold."""
DURABLE = frozenset({TargetKind.PARTITION, TargetKind.UNIT, TargetKind.CGROUP, TargetKind.DOMAIN})
"""Kinds whose name means the same after a restart: their attachments are kept. A thread's id does not."""


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One thing to hold: by ``id`` a thread, process, tree or partition, by ``name`` a unit, cgroup or domain."""

    kind: TargetKind
    id: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = 0
    """A thread's, a process' or a partition's id, from 1."""
    name: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    """``nginx.service``; a cgroup's path below the mount (``/system.slice/x.scope``); a domain's name or UUID."""
    uri: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    """libvirt's URI of a domain; `DEFAULT_URI` where it is empty."""

    def __post_init__(self) -> None:
        if self.kind in _BY_ID and (not self.id or self.name or self.uri):
            raise ValueError(f"a {self.kind.value} is given by id (1 or more), not by name")
        if self.kind not in _BY_ID and (self.id or not self.name or "\0" in self.name):
            raise ValueError(f"a {self.kind.value} is given by name, not by id")
        if self.uri and self.kind is not TargetKind.DOMAIN:
            raise ValueError("uri is for domains only")

    def __str__(self) -> str:
        what = f"{self.kind.value} {self.name or self.id}"
        return f"{what} of {self.uri}" if self.uri else what


class Rule(StrEnum):
    """How a budget follows what was executed; docs/deadlined.md has both rules."""

    FAST = "fast"
    """A thread that never slept gets the cap at once; one that did, what it needed and a little more."""
    REFERENCE = "reference"
    """The document's: the budget grows faster and faster while the need does."""
    FIXED = "fixed"
    """The initial budget for ever: a limit."""


class Actuator(StrEnum):
    """What enforces a budget."""

    DEADLINE = "deadline"
    """SCHED_DEADLINE for each thread: guaranteed, and no more than that."""
    CPU_MAX = "cpu.max"
    """The quota of a cgroup v2: a limit for all its threads together, no guarantee. Units and cgroups only."""
    CPU_RT_MAX = "cpu.rt.max"
    """The real-time quota of a cgroup v2, on kernels that have it. Units and cgroups only."""


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the budget is sized. All times in nanoseconds; see docs/deadlined.md for what each does."""

    rule: Rule = Rule.FAST
    period_ns: Annotated[int, msgspec.Meta(ge=DL_MIN_PERIOD_NS, le=DL_MAX_PERIOD_NS)] | Literal["auto"] = (
        100 * NS_PER_MS
    )
    """``auto``: that of the thread's own activations, where they show one; 100 ms until then, and where they do not."""
    initial_budget_ns: Annotated[int, msgspec.Meta(ge=DL_MIN_RUNTIME_NS, le=DL_MAX_PERIOD_NS)] = 10 * NS_PER_MS
    """Need not be accurate: the rule finds the need by itself."""
    overallocation: Annotated[float, msgspec.Meta(gt=0, le=4)] = 0.1
    """The share above the measured need (0.1: ten per cent): growth could never be seen without it."""
    window: Annotated[int, msgspec.Meta(ge=1, le=WINDOW_MAX)] = 5
    """How many samples the largest is taken of."""
    cap: Annotated[float, msgspec.Meta(gt=0, le=0.95)] = 0.8
    """The largest share of the period that one thread may be given; of a group, for each of the host's CPUs."""
    min_budget_ns: Annotated[int, msgspec.Meta(ge=DL_MIN_RUNTIME_NS, le=DL_MAX_PERIOD_NS)] = 1 * NS_PER_MS
    """The floor: an idle thread keeps this much, as far as its attachment's share goes where the host is full."""
    weight: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 100
    """The attachment's part where the host can't give everybody what he needs, as of cpu.weight (cgroup-v2.rst)."""
    actuator: Actuator = Actuator.DEADLINE
    dry_run: bool = False
    """Only measure and tell what would be set; nothing is changed."""

    @property
    def first_period_ns(self) -> int:
        """The period to begin with."""
        return _AUTO_PERIOD_NS if self.period_ns == "auto" else self.period_ns


_AUTO_PERIOD_NS = 100 * NS_PER_MS


class AttachRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of ``POST /v1/attachments``."""

    target: Target
    policy: dict[str, Any] = {}
    """Fields of `Policy`; what is left out is as deadlined's settings have it."""


class ThreadState(StrEnum):
    """What deadlined does with one thread of an attachment."""

    HELD = "held"
    """It is in SCHED_DEADLINE with the budget shown."""
    WAITING = "waiting"
    """Not in SCHED_DEADLINE (yet): ``reason`` says why and what would change it; tried again by itself."""
    STUCK = "stuck"
    """The kernel left it throttled for ever; it was taken out and is attached again once that is safe."""
    WATCHED = "watched"
    """A dry run: measured, and left as it is."""


class PeriodOrigin(StrEnum):
    """Where a thread's period comes from."""

    GIVEN = "given"
    OBSERVING = "observing"
    """``auto``: its context switches are being looked at."""
    INFERRED = "inferred"
    UNKNOWN = "unknown"
    """``auto``: they show no clear period; the default stays."""


class ThreadStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One held thread. Times in nanoseconds; ``executed_ns`` and ``run_delay_ns`` are per period, of the last cycle."""

    tid: int
    name: str
    state: ThreadState
    budget_ns: int
    """In force; 0 where it is not held."""
    wanted_ns: int
    """What the rule wants; more than the budget where the host, a cgroup or a suspension does not let it have that."""
    period_ns: int
    period_origin: PeriodOrigin
    executed_ns: int
    run_delay_ns: int
    saturated: bool
    """It never slept in the last window, and used its budget up."""
    multiplier: int
    """The reference rule's ``l``: doubles while the need keeps growing; 1 under the other rules."""
    confidence: float = 0.0
    """Of an inferred period: 0 to 1, the share of its activations that fit."""
    reason: str = ""


class GroupStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A cgroup that is held by its own quota. Times in nanoseconds, per period, of the last cycle."""

    path: str
    """The cgroup, below the mount."""
    budget_ns: int
    """In force; 0: not limited by deadlined."""
    wanted_ns: int
    period_ns: int
    executed_ns: int
    throttled_ns: int
    saturated: bool
    reason: str = ""


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    """A target that deadlined holds."""

    id: int
    target: Target
    policy: Policy
    threads: tuple[ThreadStatus, ...] = ()
    group: GroupStatus | None = None
    """Where a cgroup's quota is the actuator; it has no threads then."""
    cycles: int = 0
    suspended: bool = False
    """The guest is suspended: its budgets are at the floor until it is resumed."""
    reason: str = ""
    """What a person should know: why the target has no threads at the moment, for one."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One window of one thread (or group: ``tid`` 0). ``time_ns`` is CLOCK_MONOTONIC at its end.

    ``executed_ns`` and ``run_delay_ns`` are of the whole window, not per period: what a rule is replayed from.
    """

    time_ns: int
    tid: int
    elapsed_ns: int
    """The window's length."""
    executed_ns: int
    run_delay_ns: int
    budget_ns: int
    """In force during the window."""
    wanted_ns: int
    """What the rule wanted after it."""
    period_ns: int
    saturated: bool = False
    multiplier: int = 1

    @property
    def executed_per_period_ns(self) -> int:
        """c: what was executed in one period, on the average of the window."""
        return self.executed_ns * self.period_ns // max(self.elapsed_ns, 1)

    @property
    def run_delay_per_period_ns(self) -> int:
        """How long it was runnable without running in one period, on the average of the window."""
        return self.run_delay_ns * self.period_ns // max(self.elapsed_ns, 1)


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
    wanted: float
    """The sum of what its rules want; above ``held`` where not everybody can have it."""
    resolution: float
    """The probe's step: differences below it say nothing."""
    monitor_policy: str
    """Under which scheduling policy deadlined itself runs, and why not a real-time one where it does not."""
    sampler: str
    """How executed time is read, and why not the cheaper way where it is not."""


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

    async def attach(self, target: Target, policy: Policy | dict[str, Any] | None = None) -> Attachment:
        """Hold a target from now on. Returns when its threads were tried once; see each thread's state.

        ``policy``: a whole one, or a dict of some of its fields; the rest is as deadlined's settings have it.

        A thread for which there is no bandwidth waits, with the reason, and is held when there is.

        Raises:
            NotFoundError: no such thread, process or partition.
            BadStateError: it is attached already, or in SCHED_DEADLINE by somebody else.
            DeniedError: the kernel refuses (privilege, pinning); the text has the cure.
            NoCapacityError: as many targets are attached as deadlined's settings allow.
            UnavailableError: the partition's vmand, or the domain's libvirt, is away.
            UnsupportedError: this host lacks what the target or the actuator needs; the text says what.
        """
        given = {} if policy is None else policy if isinstance(policy, dict) else msgspec.to_builtins(policy)
        request = AttachRequest(target=target, policy=given)
        answer = await self._call("POST", "/v1/attachments", body=msgspec.json.encode(request))
        return msgspec.json.decode(answer, type=Attachment)

    async def change(self, attachment: int, policy: Policy | dict[str, Any]) -> Attachment:
        """Size an attachment's budgets by another policy from now on; of a dict, only the fields that it has.

        Raises:
            BadRequestError: the fields contradict each other, or can't be changed (actuator, dry_run).
        """
        answer = await self._call("PATCH", f"/v1/attachments/{attachment}", body=msgspec.json.encode(policy))
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
        vendor.prepare("aiohttp")
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
