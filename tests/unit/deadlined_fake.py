"""A deadlined that answers what a test tells it to, on a real unix socket."""

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web

from edgehold.api.deadlined import (
    Attachment,
    AttachmentDetail,
    Capacity,
    PeriodOrigin,
    Policy,
    Sample,
    Target,
    TargetKind,
    ThreadState,
    ThreadStatus,
)
from edgehold.errors import EdgeholdError
from edgehold.testing.daemons import private_directory
from edgehold.wire.http import answer, refusal, serve

MS = 1_000_000


def thread(tid: int = 4712, **more: Any) -> ThreadStatus:
    """A held thread; what is not given is ordinary."""
    ordinary: dict[str, Any] = {
        "name": "camera",
        "state": ThreadState.HELD,
        "budget_ns": 11 * MS,
        "wanted_ns": 11 * MS,
        "period_ns": 100 * MS,
        "period_origin": PeriodOrigin.GIVEN,
        "executed_ns": 10 * MS,
        "run_delay_ns": 0,
        "saturated": False,
        "multiplier": 1,
    }
    return ThreadStatus(tid=tid, **(ordinary | more))


def attachment(number: int = 1, *threads: ThreadStatus, **more: Any) -> Attachment:
    """An attachment of a process."""
    ordinary: dict[str, Any] = {"target": Target(kind=TargetKind.PROCESS, id=4711), "policy": Policy()}
    return Attachment(id=number, threads=threads, **(ordinary | more))


def sample(cycle: int, *, executed_ms: float = 50, **more: Any) -> Sample:
    """A window of half a second, of a thread with a period of 100 ms."""
    ordinary: dict[str, Any] = {
        "tid": 4712,
        "elapsed_ns": 500 * MS,
        "run_delay_ns": 0,
        "budget_ns": 11 * MS,
        "wanted_ns": 11 * MS,
        "period_ns": 100 * MS,
    }
    return Sample(time_ns=cycle * 500 * MS, executed_ns=round(executed_ms * MS), **(ordinary | more))


class FakeDeadlined:
    """Answers each method and path with what stands in ``answers``: a value, or an error."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        one = attachment(1, thread())
        self.answers: dict[str, Any] = {
            "POST /v1/attachments": one,
            "GET /v1/attachments": [one],
            "GET /v1/attachments/1": AttachmentDetail(attachment=one, history=tuple(map(sample, range(30)))),
            "PATCH /v1/attachments/1": one,
            "DELETE /v1/attachments/1": None,
            "GET /v1/capacity": Capacity(
                cpus=2, available=1.6, held=0.2, wanted=0.2, resolution=0.0001, monitor_policy="SCHED_FIFO 1",
                sampler="a BPF iterator",
            ),
        }  # fmt: skip
        self.asked: list[tuple[str, Any]] = []

    async def handle(self, request: web.Request) -> web.Response:
        """Remember and answer."""
        what = f"{request.method} {request.path}"
        text = await request.read()
        self.asked.append((f"{request.method} {request.path_qs}", json.loads(text) if text else None))
        found = self.answers[what]
        if isinstance(found, EdgeholdError):
            return refusal(found)
        return web.Response(status=204) if found is None else answer(found)


@contextlib.asynccontextmanager
async def fake_deadlined() -> AsyncIterator[FakeDeadlined]:
    """One that listens until the block ends."""
    with private_directory() as directory:
        fake = FakeDeadlined(directory / "api.sock")
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", fake.handle)
        async with serve(app, fake.socket):
            yield fake
