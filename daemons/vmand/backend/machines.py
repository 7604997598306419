"""Which program runs a guest of which architecture here, and with what."""

import asyncio
import os
import re
import shutil
from pathlib import Path

from edgehold.errors import UnsupportedError
from vmand.backend.command import Machine
from vmand.backend.kvm import Accelerators
from vmand.backend.process import end_child
from vmand.config import Config

_VERSION_S = 5.0
_PACKAGES = {"x86_64": "qemu-system-x86", "aarch64": "qemu-system-arm"}


class Machines:
    """The emulators of this host. A guest of the host's own architecture is accelerated where that works."""

    def __init__(self, config: Config) -> None:
        self._programs = {"x86_64": config.qemu, "aarch64": config.qemu_aarch64}
        self._native = os.uname().machine
        self._versions: dict[tuple[str, int], str] = {}
        self._setting = config.accelerator
        program = self._programs.get(self._native, config.qemu)
        self._accelerators = Accelerators(program, config.accelerator, cache=config.runtime / "kvm.json")

    def archs(self) -> tuple[str, ...]:
        """The architectures whose emulator is installed."""
        return tuple(arch for arch, program in self._programs.items() if shutil.which(program))

    async def accelerator(self) -> tuple[str, str]:
        """What guests of the host's own architecture get: (``kvm`` or ``tcg``, why)."""
        return await self._accelerators.chosen()

    async def version(self) -> str:
        """What runs guests of the host's own architecture, as ``QEMU 7.2.22``. Empty where it can't be told."""
        path = shutil.which(self._programs.get(self._native, ""))
        if path is None:
            return ""
        try:
            key = (path, Path(path).stat().st_mtime_ns)  # noqa: ASYNC240 - one stat(2)
        except OSError:
            return ""
        if key not in self._versions:
            self._versions = {key: await _version(path)}
        return self._versions[key]

    async def machine(self, arch: str) -> Machine:
        """What runs a guest of this architecture.

        Raises:
            UnsupportedError: nothing does here; the text has the cure.
        """
        program = self._programs[arch]
        path = shutil.which(program)
        if path is None:
            raise UnsupportedError(
                f"kernel: it is for {arch}, and {program} is not installed (Debian package {_PACKAGES[arch]})"
            )
        if arch == self._native:
            accelerator, _why = await self._accelerators.chosen()
        elif self._setting == "kvm":
            raise UnsupportedError(
                f"kernel: it is for {arch}, this host is {self._native}, and the settings allow no emulation "
                "(accelerator is kvm; set it to auto)"
            )
        else:
            accelerator = "tcg"
        return Machine(qemu=path, arch=arch, accelerator=accelerator)

    async def close(self) -> None:
        """End what is being tried."""
        await self._accelerators.close()


async def _version(path: str) -> str:
    try:
        process = await asyncio.create_subprocess_exec(
            path,
            "--version",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return ""
    try:
        async with asyncio.timeout(_VERSION_S):
            said, _errors = await process.communicate()
    except TimeoutError:
        return ""
    finally:
        await end_child(process)
    found = re.search(rb"version (\d+(?:\.\d+)+)", said)
    return f"QEMU {found[1].decode()}" if found else ""
