"""Which threads a systemd unit has now: those of its cgroup, in which systemd puts every process of it.

systemd is asked in a child process (systemctl), once when a unit is attached and then seldom, only while the unit has
no cgroup: where it will be is known mostly, and looked for in every cycle. Where systemd is not what runs the host, a
cgroup of the unit's name is taken.
"""

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deadlined import cgroups
from deadlined.cgroups import CgroupSource
from edgehold.clock import Clock
from edgehold.errors import BadRequestError, DeniedError, EdgeholdError, NotFoundError, UnavailableError
from edgehold.kernel import cgroup
from edgehold.kernel.births import Births
from edgehold.kernel.cgroup import Hierarchy

log = logging.getLogger(__name__)

# What sd_booted(3) looks at.
BOOTED = Path("/run/systemd/system")
_SYSTEMCTL = ("systemctl",)
_ANSWER_S = 5.0
_REAP_S = 1.0
# A unit that has no cgroup is asked about so seldom: systemctl costs some milliseconds.
_ASK_AGAIN_S = 10.0
# unit_name_is_valid() of systemd, src/basic/unit-name.c: these characters, and at most 255 of them.
_NAME = re.compile(r"[A-Za-z0-9:_.\\@-]{1,255}")
_WITH_THREADS = frozenset({"service", "scope", "slice", "socket", "mount", "swap"})
_WITHOUT = frozenset({"target", "timer", "path", "device", "automount"})
_ABSENT = {"": "it is not started", "active": "it is active and has no process"}
# Cgroups that are looked through for a unit's name, where no systemd can be asked.
_MOST_DIRECTORIES = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What systemd, or the tree of cgroups, says about a unit."""

    known: bool
    path: str
    """Its cgroup, or where that will be; empty: nobody knows."""
    absent: str
    """Why it has no threads, where it has none."""


def full_name(name: str) -> str:
    """A unit's whole name: ``nginx`` is nginx.service, as for systemctl.

    Raises:
        BadRequestError: it is none, or of a kind that never has threads; the text says what would be right.
        DeniedError: nobody may hold that.
    """
    if not _NAME.fullmatch(name):
        raise BadRequestError(
            f"{name!r} is no unit's name: letters, digits and :_.\\@- are, and systemd-escape(1) writes others"
        )
    _, _, kind = name.rpartition(".")
    if kind in _WITHOUT:
        raise BadRequestError(f"{name}: a {kind} unit has no threads; attach the service that it starts")
    full = name if "." in name and kind in _WITH_THREADS else f"{name}.service"
    if full.partition("@")[2].startswith(".") or full.startswith((".", "@")):
        raise BadRequestError(
            f"{full} is a template and has no threads; name an instance, as {full.replace('@', '@1')}"
        )
    if full in {"init.scope", "-.slice"}:
        raise DeniedError(f"{full} has the init process in it, which must never be throttled; attach a single service")
    return full


def expected_path(name: str, slice_name: str) -> str:
    """Where systemd will make the cgroup of a unit of this slice: ``a-b.slice`` lies in ``a.slice``.

    Source: systemd.slice(5); a name that could be a file's of the kernel begins with ``_`` there (cg_escape()).
    """
    parts: list[str] = []
    if name.endswith(".slice"):
        slice_name, name = name, ""
    if slice_name not in {"", "-.slice"}:
        words = slice_name.removesuffix(".slice").split("-")
        parts = [f"{'-'.join(words[: count + 1])}.slice" for count in range(len(words))]
    if name:
        parts.append(f"_{name}" if name[0] in "_." or name.startswith("cgroup.") else name)
    return "/" + "/".join(parts)


def parse_show(text: str, name: str) -> _Told:
    """The answer of ``systemctl show`` about one unit."""
    facts = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    state = facts.get("ActiveState", "")
    if facts.get("LoadState", "") == "not-found" and not facts.get("ControlGroup"):
        return _Told(known=False, path="", absent="systemd knows no unit of this name")
    slice_name = facts.get("Slice", "")
    path = facts.get("ControlGroup", "") or (
        expected_path(name, slice_name) if slice_name or name.endswith(".slice") else ""
    )
    return _Told(known=True, path=path, absent=_ABSENT.get(state, f"it is {state}"))


class UnitSource(CgroupSource):
    """A unit's threads."""

    def __init__(
        self, name: str, units: "Units", *, births: Births, counts: Hierarchy | None, clock: Clock | None
    ) -> None:
        super().__init__(f"unit {name}", (), births=births, counts=counts, clock=clock)
        self.name = name
        self._units = units

    def close(self) -> None:
        self._units.drop(self)
        super().close()


class Units:
    """Knows where the cgroups of attached units are. `run` is the task that keeps that true."""

    def __init__(
        self,
        births: Births,
        *,
        seen: Sequence[Hierarchy] | None = None,
        booted: Path = BOOTED,
        systemctl: Sequence[str] = _SYSTEMCTL,
        ask_again_s: float = _ASK_AGAIN_S,
        clock: Clock | None = None,
    ) -> None:
        """``seen``: `cgroup.hierarchies()`, which is read when it is needed first."""
        self._births = births
        self._seen = seen
        self._booted = booted
        self._systemctl = tuple(systemctl)
        self._ask_again_s = ask_again_s
        self._clock = clock
        self._sources: set[UnitSource] = set()
        self._wanted = asyncio.Event()

    async def open(self, name: str, *, must_exist: bool = True) -> UnitSource:
        """The source of a unit. One that is not active is waited for.

        ``must_exist`` false: one that systemd does not know is waited for too, as after a restart.

        Raises:
            BadRequestError: it is no name of a unit that can have threads.
            NotFoundError: there is no such unit.
            DeniedError: init or deadlined is in it.
            UnavailableError: systemd does not answer.
            OSError: no descriptor is left.
        """
        name = full_name(name)
        counts = cgroup.of_controller(self._hierarchies(), "pids")
        source = UnitSource(name, self, births=self._births, counts=counts, clock=self._clock)
        try:
            told = await self._ask(name)
        except UnavailableError as error:
            if must_exist:
                raise
            told = _Told(known=True, path="", absent=error.message)
        if must_exist and not told.known:
            raise NotFoundError(f"{source.what}: {told.absent}; systemctl list-units shows those there are")
        self._tell(source, told)
        cgroups.begin(source, must_exist=False)
        self._sources.add(source)
        self._wanted.set()
        return source

    def drop(self, source: UnitSource) -> None:
        """Not needed any more."""
        self._sources.discard(source)
        if not self._sources:
            self._wanted.clear()

    async def run(self) -> None:
        """For ever: ask about those that have no cgroup."""
        while True:
            await self._wanted.wait()
            await asyncio.sleep(self._ask_again_s)
            for source in [one for one in self._sources if not one.here]:
                try:
                    self._tell(source, await self._ask(source.name))
                except EdgeholdError as error:
                    log.debug("%s: %s", source.what, error)  # it is looked for where it was

    def _hierarchies(self) -> Sequence[Hierarchy]:
        if self._seen is None:
            self._seen = cgroup.hierarchies()
        return self._seen

    def _tell(self, source: UnitSource, told: _Told) -> None:
        places = [(one, told.path) for one in _of_units(self._hierarchies())] if told.path else None
        source.expect(places, absent=told.absent)

    async def _ask(self, name: str) -> _Told:
        if self._booted.is_dir():
            wanted = ("LoadState", "ActiveState", "ControlGroup", "Slice")
            show = ("show", *(f"--property={one}" for one in wanted), "--", name)
            return parse_show(await _output(*self._systemctl, *show), name)
        path = await asyncio.to_thread(_search, name, _of_units(self._hierarchies()))
        absent = "no cgroup has this name, and no systemd runs this host"
        return _Told(known=bool(path), path=path, absent="its cgroup is gone" if path else absent)


def _of_units(seen: Sequence[Hierarchy]) -> list[Hierarchy]:
    """Where systemd makes cgroups: in version 2, or beside it in a version 1 of its own (the hybrid layout)."""
    both = (cgroup.of_controller(seen, "name=systemd"), cgroup.unified(seen))
    return [one for one in dict.fromkeys(both) if one is not None]


def _search(name: str, seen: Sequence[Hierarchy]) -> str:
    """The path of the first cgroup of this name; empty: there is none."""
    left = _MOST_DIRECTORIES
    for one in seen:
        for directory, below, _files in os.walk(one.mount):
            if found := {name, f"_{name}"}.intersection(below):
                return one.path(f"{directory}/{found.pop()}") or ""
            left -= 1
            if left <= 0:
                return ""
    return ""


async def _output(*argv: str) -> str:
    """What a command wrote. Raises `UnavailableError`."""
    try:
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
    except OSError as error:
        raise UnavailableError(f"{argv[0]} can't be started: {error.strerror}") from error
    try:
        async with asyncio.timeout(_ANSWER_S):
            out, err = await process.communicate()
    except TimeoutError:
        raise UnavailableError(f"systemd does not answer within {_ANSWER_S:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_REAP_S):
                    await process.wait()
    if process.returncode:
        raise UnavailableError(f"systemd does not answer: {err.decode(errors='replace').strip()[:300]}")
    return out.decode(errors="replace")
