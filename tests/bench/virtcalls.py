"""libvirt-python in a process of the system's Python, with a connection to each of two daemons: it does the timing.

Every call goes to one side and then to the other, so that what else the host does meets both alike.
"""

import asyncio
import json
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from tests.bench.libvirt import SYSTEM_PYTHON

LIST = "listAllDomains"
KINDS = ("getVersion", "state", "info", "XMLDesc", LIST)

# Reads a command a line as JSON, answers with a line of JSON. A side is a connection and the domain that is asked.
_CHILD = """
import json, sys, time
import libvirt

libvirt.registerErrorHandler(lambda *_: None, None)
connections, domains = {}, {}


def bound(who, kind):
    owner = connections[who] if kind in ("getVersion", "listAllDomains") else domains[who]
    return getattr(owner, kind)


def open_(who, uri):
    connections[who] = libvirt.open(uri)


def define(who, xmls):
    for xml in xmls:
        connections[who].defineXML(xml)


def start(who, name):
    domains[who] = connections[who].lookupByName(name)
    domains[who].create()


def count(who):
    return len(connections[who].listAllDomains())


def latency(kinds, rounds, warm_up):
    rows = [(kind, who, bound(who, kind), []) for kind in kinds for who in connections]
    turned = [row for n in range(0, len(rows), 2) for row in (rows[n + 1], rows[n])]
    for n in range(warm_up + rounds):
        order = turned if n % 2 else rows
        # Who was asked just now answers sooner: before each measured call it was the other side's turn.
        for _kind, _who, call, _taken in order[-2:]:
            call()
        for _kind, _who, call, taken in order:
            begin = time.perf_counter_ns()
            call()
            spent = time.perf_counter_ns() - begin
            if n >= warm_up:
                taken.append(spent)
    return [[kind, who, taken] for kind, who, _call, taken in rows]


def calls(who, kind, times):
    call = bound(who, kind)
    for _ in range(times):
        call()


commands = {"open": open_, "define": define, "start": start, "count": count, "latency": latency, "calls": calls}
for line in sys.stdin:
    asked = json.loads(line)
    try:
        answer = {"done": commands[asked.pop("command")](**asked)}
    except libvirt.libvirtError as error:
        answer = {"error": f"{error} (code {error.get_error_code()})"}
    print(json.dumps(answer), flush=True)
"""


class VirtCalls:
    """The process. ``with VirtCalls() as calls: …``; its end closes the connections."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [SYSTEM_PYTHON, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._process.communicate(timeout=30)  # the end of its input is its end
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    async def open(self, who: str, uri: str) -> None:
        """Connect; the side is called ``who`` from now on."""
        await self._ask("open", who=who, uri=uri)

    async def define(self, who: str, xmls: list[str]) -> None:
        """Define domains."""
        await self._ask("define", who=who, xmls=xmls)

    async def start(self, who: str, name: str) -> None:
        """Start a defined domain; it is the one that is asked."""
        await self._ask("start", who=who, name=name)

    async def count(self, who: str) -> int:
        """How many domains there are."""
        return int(await self._ask("count", who=who))

    async def latency_us(
        self, kinds: Sequence[str], *, rounds: int, warm_up: int
    ) -> dict[tuple[str, str], list[float]]:
        """Microseconds of each call, by kind and side. A round has one call of each kind to each side."""
        answer = await self._ask("latency", kinds=list(kinds), rounds=rounds, warm_up=warm_up)
        return {(kind, who): [one / 1000 for one in taken] for kind, who, taken in answer}

    async def calls(self, who: str, kind: str, times: int) -> None:
        """Call that often."""
        await self._ask("calls", who=who, kind=kind, times=times)

    async def _ask(self, command: str, **arguments: object) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise RuntimeError("libvirt-python has no pipe")
        stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        stdin.flush()
        line = await asyncio.to_thread(stdout.readline)
        if not line:
            raise RuntimeError(f"libvirt-python ended at {command!r} (Debian package python3-libvirt)")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{command} {arguments.get('who', '')}: {answer['error']}")
        return answer["done"]
