"""deadlined's side of a conversation about libvirt's domains: the child that asks libvirt, and which URIs it may open.

The child (`deadlined.domainlook`) is started with the first question and again whenever it ended; whoever hangs is
ended by force. Nothing here knows what a source is.
"""

import asyncio
import contextlib
import importlib.util
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import msgspec

from edgehold.errors import BadRequestError, EdgeholdError, UnavailableError, UnsupportedError, from_wire

_SCRIPT = Path(__file__).with_name("domainlook.py")
_SYSTEM_PYTHON = "/usr/bin/python3"  # python3-libvirt is Debian's, for Debian's Python
_NO_MODULE = 69
# libvirt answers within milliseconds. Twice this, for who waits behind another question, is less than clients wait.
ANSWER_S = 6.0
_ANSWER_BYTES = 16 << 20
_MODES = frozenset({"auto", "legacy", "direct"})


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """A domain, as libvirt and /proc have it at the moment."""

    known: bool = True
    """libvirt has it."""
    uuid: str = ""
    state: str = ""
    """In a person's words; ``shut off`` where it does not run."""
    suspended: bool = False
    """Its virtual CPUs stand still."""
    pid: int = 0
    """Its QEMU process; 0 where it has none that is known."""
    tids: tuple[int, ...] = ()
    """Its vCPU threads."""
    reason: str = ""
    """Why a running one has no known thread."""


class _Answer(msgspec.Struct, frozen=True):
    domains: dict[str, Seen] = {}
    error: dict[str, Any] | None = None


_DECODER = msgspec.json.Decoder(_Answer)


def check_uri(uri: str) -> None:
    """That libvirt may be asked there: of this host, and by nothing but a unix socket.

    Who may attach is not always root, and libvirt's URIs can name programs to run and files to read (``qemu+ext``,
    ``command=``, ``test:///FILE``), which its library would do as deadlined's user. So only what is known is let in.
    Source: libvirt.org/uri.html.

    Raises:
        UnsupportedError: another driver, another host.
        BadRequestError: it is no such URI.
    """
    try:
        parts = urlsplit(uri)
        given = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True) if parts.query else []
    except ValueError as error:
        raise BadRequestError(f"uri {uri!r}: {error}") from None
    driver, _, transport = parts.scheme.partition("+")
    if not driver:
        raise BadRequestError(f"uri {uri!r}: write it as qemu:///system or qemu:///session")
    if driver not in {"qemu", "vman"}:
        raise UnsupportedError(
            f"uri {uri!r}: deadlined holds virtual CPUs of QEMU's domains (qemu:///system, qemu:///session) and of "
            f"partitions (vman:///system); of a container of driver {driver} attach the cgroup (--cgroup)"
        )
    if transport not in {"", "unix"} or parts.netloc:
        raise UnsupportedError(
            f"uri {uri!r}: only domains of this host have threads here: {driver}:///system, with "
            "?socket=PATH where libvirt listens elsewhere; run deadlined on the other host for that one's"
        )
    paths = ("/system", "/session") if driver == "qemu" else ("/system",)
    if parts.path not in paths or parts.fragment:
        raise BadRequestError(f"uri {uri!r}: give {' or '.join(f'{driver}://{path}' for path in paths)}")
    for name, value in given:
        if not (name == "mode" and value in _MODES) and not (name == "socket" and _is_path(value)):
            raise BadRequestError(f"uri {uri!r}: {name}={value} can't be given; only socket=/PATH and mode= can")


def _is_path(text: str) -> bool:
    return text.startswith("/") and text.isprintable()


class Conversation:
    """Questions to libvirt at one URI, one after another."""

    def __init__(self, uri: str, *, answer_s: float) -> None:
        self.uri = uri
        self._answer_s = answer_s
        self._child: Process | None = None
        self._busy = asyncio.Lock()

    async def ask(self, names: Sequence[str]) -> dict[str, Seen]:
        """These domains as they are now.

        Raises:
            UnavailableError: libvirt is away, or does not answer in time.
            DeniedError: it lets nobody like us in.
            UnsupportedError: libvirt-python is not installed.
        """
        async with self._busy:
            try:
                async with asyncio.timeout(self._answer_s):
                    line = await self._exchange(msgspec.json.encode(names) + b"\n")
            except TimeoutError:
                await self._end()
                raise UnavailableError(
                    f"{self.uri}: libvirt does not answer within {self._answer_s:g} s; look whether its daemon hangs"
                ) from None
            except BaseException:
                await self._end()  # else the next question would get this one's answer
                raise
        try:
            answer = _DECODER.decode(line)
        except msgspec.DecodeError as error:
            raise UnavailableError(f"{self.uri}: the child that asks libvirt said {line[:200]!r}: {error}") from error
        if answer.error is not None:
            raise from_wire(answer.error)
        return answer.domains

    async def close(self) -> None:
        """End the child. The next question would start another."""
        async with self._busy:
            await self._end()

    async def _exchange(self, question: bytes) -> bytes:
        if self._child is None:
            self._child = await _start(self.uri)
        stdin, stdout = self._child.stdin, self._child.stdout
        if stdin is None or stdout is None:
            raise AssertionError("the child has no pipes")
        try:
            stdin.write(question)
            await stdin.drain()
            line = await stdout.readline()
        except (OSError, ValueError) as error:  # ValueError: an answer beyond _ANSWER_BYTES
            raise UnavailableError(f"{self.uri}: the child that asks libvirt failed: {error}") from error
        if not line.endswith(b"\n"):
            raise await self._ended(self._child)
        return line

    async def _ended(self, child: Process) -> EdgeholdError:
        if await child.wait() == _NO_MODULE:
            return UnsupportedError(
                "python3-libvirt is not installed: deadlined asks libvirt through it (apt install python3-libvirt)"
            )
        return UnavailableError(f"{self.uri}: the child that asks libvirt ended with status {child.returncode}")

    async def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
            if child.stdin is not None:
                child.stdin.close()


def interpreter() -> str:
    """The Python that has libvirt's module: this one, where somebody installed it into it, or else the system's."""
    return sys.executable if importlib.util.find_spec("libvirt") is not None else _SYSTEM_PYTHON


async def _start(uri: str) -> Process:
    """The child. It begins as an ordinary process: deadlined's own real-time policy ends at a fork.

    Its environment is what libvirt needs for a session and no more: no aliases, no programs, and no libvirtd that would
    be started for us.
    """
    kept = {name: value for name in ("HOME", "XDG_RUNTIME_DIR") if (value := os.environ.get(name))}
    try:
        return await asyncio.create_subprocess_exec(
            interpreter(), "-I", str(_SCRIPT), uri,
            stdin=PIPE, stdout=PIPE, limit=_ANSWER_BYTES, start_new_session=True,
            env=kept | {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "LIBVIRT_AUTOSTART": "0"},
        )  # fmt: skip
    except FileNotFoundError:
        raise UnsupportedError(
            f"python3-libvirt is not installed, and neither is {_SYSTEM_PYTHON}; deadlined asks libvirt through it"
        ) from None
    except OSError as error:
        raise UnavailableError(f"{uri}: the child that asks libvirt can't be started: {error.strerror}") from error
