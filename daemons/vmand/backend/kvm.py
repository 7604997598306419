"""Which accelerator guests get: KVM only where a tiny guest has proved that it runs kernels here.

``/dev/kvm`` proves nothing: on a cloud host without nested virtualisation it may open, run real mode, and then carry
out a kernel instruction by instruction, so slowly that it seems to hang. The tiny guest (kvmprobe.S) does what a kernel
does first and leaves; what it did not get to is the reason.
"""

import asyncio
import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from edgehold.errors import FailedError
from vmand.backend.kvmprobe import CODE
from vmand.backend.process import end_child

_DEVICE = Path("/dev/kvm")
_DEADLINE_S = 5.0
_PASSED = 33  # isa-debug-exit: (0x10 << 1) | 1
_STEPS = {
    "R": "run in real mode",
    "P": "enter protected mode",
    "L": "enter long mode with paging",
    "H": "run in the high half of the address space",
    "S": "run a loop at the CPU's own speed: its code is emulated instruction by instruction",
    "T": "take a timer interrupt out of HLT",
    "U": "run user mode and come back from it",
}
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def image() -> bytes:
    """The probe as a 64 KiB BIOS image: the code at its beginning, the jump to it where a CPU begins."""
    reset = bytes.fromhex("ea000000f0")  # ljmpw $0xf000, $0
    return CODE.ljust(0xFFF0, b"\0") + reset.ljust(16, b"\0")


def verdict(status: int | None, letters: str, complaint: str) -> str:
    """Nothing where the guest passed, else what it could not do. ``status`` is None where the deadline passed."""
    if status == _PASSED:
        return ""
    missing = next((text for letter, text in _STEPS.items() if letter not in letters), "leave")
    if not letters and status not in {None, 0}:
        return f"QEMU can't use it: {complaint or f'status {status}'}"
    if status is None:
        return f"within {_DEADLINE_S:g} s a tiny guest did not {missing}"
    return f"a tiny guest's CPU was reset when it should {missing}"


class Accelerators:
    """The choice, made once per boot of the host and kept."""

    def __init__(self, qemu: str, setting: str, *, cache: Path) -> None:
        self._qemu = qemu
        self._setting = setting
        self._cache = cache
        self._task: asyncio.Task[tuple[str, str]] | None = None

    async def chosen(self) -> tuple[str, str]:
        """(``kvm`` or ``tcg``, why). The first call may take seconds."""
        if self._setting != "auto":
            return self._setting, "set by accelerator in the settings"
        if self._task is None or (self._task.done() and self._task.exception() is not None):
            self._task = asyncio.create_task(self._choose(), name="KVM probe")
        # Shielded: a caller that gives up does not take the answer away from the others.
        return await asyncio.shield(self._task)

    async def close(self) -> None:
        """End a probe under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _choose(self) -> tuple[str, str]:
        try:
            return await self._find_out()
        except OSError as error:
            raise FailedError(f"KVM can't be tried: {error}; or set accelerator to kvm or tcg") from error

    async def _find_out(self) -> tuple[str, str]:
        if not _DEVICE.exists():  # noqa: ASYNC240 - a look at /dev does not block
            return "tcg", f"{_DEVICE} does not exist"
        if not os.access(_DEVICE, os.R_OK | os.W_OK):
            return "tcg", f"vmand may not open {_DEVICE}"
        if os.uname().machine != "x86_64":
            return "kvm", f"{_DEVICE} opens; there is no tiny guest of this architecture to try it with"
        key = self._key()
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(self._cache.read_text(encoding="utf-8"))
            if kept["key"] == key:
                return str(kept["accelerator"]), str(kept["reason"])
        failure = await self._try()
        answer = ("tcg", f"KVM does not run kernels here: {failure}") if failure else ("kvm", "a tiny guest ran")
        # Kept until the host boots: not being able to keep it costs the next start some seconds, nothing else.
        with contextlib.suppress(OSError):
            text = json.dumps({"key": key, "accelerator": answer[0], "reason": answer[1]})
            self._cache.write_text(text, encoding="utf-8")
        return answer

    def _key(self) -> list[str]:
        path = shutil.which(self._qemu) or ""
        changed = str(Path(path).stat().st_mtime_ns) if path else ""
        return [_BOOT_ID.read_text(encoding="ascii").strip(), path, changed]

    async def _try(self) -> str:
        with tempfile.TemporaryDirectory(prefix="vmand-kvm-") as name:
            bios, letters = Path(name) / "probe.bin", Path(name) / "letters"
            bios.write_bytes(image())
            argv = [self._qemu, "-machine", "q35", "-accel", "kvm", "-cpu", "host", "-m", "16", "-nodefaults"]
            argv += ["-no-user-config", "-display", "none", "-sandbox", "on", "-no-reboot", "-bios", str(bios)]
            argv += ["-device", "isa-debug-exit,iobase=0xf4,iosize=1", "-debugcon", f"file:{letters}"]
            try:
                process = await asyncio.create_subprocess_exec(
                    *argv,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.PIPE,
                )
            except OSError as error:
                raise FailedError(f"{self._qemu} can't be started: {error.strerror}; is it installed?") from error
            complaint, status = b"", None
            try:
                async with asyncio.timeout(_DEADLINE_S):
                    _out, complaint = await process.communicate()
                status = process.returncode
            except TimeoutError:
                pass
            finally:
                await end_child(process)
            seen = letters.read_text(encoding="ascii", errors="replace")[:64] if letters.exists() else ""
        lines = complaint.decode(errors="replace").strip().splitlines()
        told = next((line for line in lines if "error" in line or "failed" in line), lines[-1] if lines else "")
        return verdict(status, seen, told.removeprefix(f"{self._qemu}: ")[:200])
