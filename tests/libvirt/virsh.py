"""virsh as a person has it: a program, its words, what it said. And the definitions that tests give to it.

``EDGEHOLD_VIRSH``: another virsh, as the words that run it (``chroot DIR virsh``). They are run as root in a mount
namespace of their own whose root is a private mount point; /tmp, /dev, /proc and /run/libvirt must be the same inside.
"""

import asyncio
import os
import re
import shlex
import subprocess
from asyncio.subprocess import Process
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgehold.testing.capability import need_command
from edgehold.testing.virtvmand import PLAIN_URI, PrivateVirtvmand, with_run_libvirt
from tests.unit.vmanctl_fake import Done, ended

CMDLINE = "quiet no_timer_check tsc=reliable panic=-1"
ANOTHER = os.environ.get("EDGEHOLD_VIRSH", "")


def need_virsh() -> None:
    """The program is there."""
    if not ANOTHER:
        need_command("virsh", "libvirt-clients")


def environment(home: Path, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """A client's own: nothing of whoever runs the tests, and no LIBVIRT_* or VIRSH_* that would choose for it."""
    path = os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
    return {"PATH": path, "HOME": str(home), "LC_ALL": "C", "TERM": "dumb", **(more or {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class Virsh:
    """Runs virsh with one of the two forms of our URI."""

    daemon: PrivateVirtvmand
    home: Path
    plain: bool = False
    """``vman:///system`` instead of the socket's path."""

    def uri(self, *, read_only: bool = False) -> str:
        """What virsh is told to connect to."""
        if self.plain:
            return PLAIN_URI
        return self.daemon.read_only_uri if read_only else self.daemon.uri

    def argv(self, words: tuple[str, ...], *, read_only: bool = False, uri: str | None = None) -> list[str]:
        """The words of the whole command; an empty ``uri`` names none."""
        to = self.uri(read_only=read_only) if uri is None else uri
        program = shlex.split(ANOTHER) if ANOTHER else ["virsh"]
        argv = [*program, *(["-r"] if read_only else []), *(["-c", to] if to else []), *words]
        return with_run_libvirt(self.daemon.sockets, argv) if self.plain or ANOTHER else argv

    async def start(
        self,
        *words: str,
        read_only: bool = False,
        uri: str | None = None,
        more: Mapping[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
    ) -> Process:
        """As a child process."""
        return await asyncio.create_subprocess_exec(
            *self.argv(words, read_only=read_only, uri=uri),
            env=environment(self.home, more),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )

    async def __call__(
        self, *words: str, read_only: bool = False, uri: str | None = None, more: Mapping[str, str] | None = None
    ) -> Done:
        """To its end; its stdin is no terminal."""
        return await ended(await self.start(*words, read_only=read_only, uri=uri, more=more))

    async def did(self, line: str) -> str:
        """What a command printed that did what it was asked for, as `squeezed`."""
        done = await self(*shlex.split(line))
        assert done.status == 0, f"virsh {line}: {done}"
        return squeezed(done.out)


def squeezed(text: str) -> str:
    """One space for many: how wide a column is, is not looked at."""
    return "\n".join(" ".join(line.split()) for line in text.splitlines()).strip()


async def until(virsh: Virsh, line: str, pattern: str, *, timeout_s: float = 60.0) -> None:
    """Until a command that looks works and says what it must.

    Raises:
        AssertionError: it did not; has what it said last.
    """
    done: Done | None = None
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                done = await virsh(*shlex.split(line))
                if done.status == 0 and re.search(pattern, squeezed(done.out), re.MULTILINE):
                    return
                await asyncio.sleep(0.1)  # nothing tells of it
    except TimeoutError:
        raise AssertionError(f"virsh {line}: {pattern!r} did not come; last: {done}") from None


def definition(
    name: str,
    *,
    uuid: str = "",
    kind: str = "vman",
    boot: tuple[Path, Path] | None = None,
    cmdline: str = CMDLINE,
    memory_mib: int = 128,
    extra: str = "",
    devices: str = "",
) -> str:
    """The XML of a domain with one virtual CPU that is not pinned. ``boot``: kernel and initial RAM disk."""
    files = f"<kernel>{boot[0]}</kernel><initrd>{boot[1]}</initrd><cmdline>{cmdline}</cmdline>" if boot else ""
    return f"""<domain type='{kind}'>
  <name>{name}</name>{f"<uuid>{uuid}</uuid>" if uuid else ""}{extra}
  <metadata><edgehold:partition xmlns:edgehold='urn:edgehold:partition:1' mode='shared'/></metadata>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu placement='static'>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type>{files}</os>
  <devices>
    <console type='pty'><target type='serial' port='0'/></console>{devices}
  </devices>
</domain>
"""
