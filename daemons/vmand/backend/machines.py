"""Which program runs a guest of which architecture here, and with what."""

import os
import shutil

from edgehold.errors import UnsupportedError
from vmand.backend.command import Machine
from vmand.backend.kvm import Accelerators
from vmand.config import Config

_PACKAGES = {"x86_64": "qemu-system-x86", "aarch64": "qemu-system-arm"}


class Machines:
    """The emulators of this host. A guest of the host's own architecture is accelerated where that works."""

    def __init__(self, config: Config) -> None:
        self._programs = {"x86_64": config.qemu, "aarch64": config.qemu_aarch64}
        self._native = os.uname().machine
        self._setting = config.accelerator
        program = self._programs.get(self._native, config.qemu)
        self._accelerators = Accelerators(program, config.accelerator, cache=config.runtime / "kvm.json")

    def archs(self) -> tuple[str, ...]:
        """The architectures whose emulator is installed."""
        return tuple(arch for arch, program in self._programs.items() if shutil.which(program))

    async def accelerator(self) -> tuple[str, str]:
        """What guests of the host's own architecture get: (``kvm`` or ``tcg``, why)."""
        return await self._accelerators.chosen()

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
