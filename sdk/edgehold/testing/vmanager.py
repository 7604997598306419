"""/dev/vmanager for tests where no firmware is: a kernel module, or a seccomp double that needs no machine of its own.

Both have the same model below (tests/vmanager/model.h); its guests do what their command line says (``vman.off=100``).
Tests run as a command of their own inside one of them and learn from the environment where the device is.
"""

import contextlib
import os
import platform
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import pytest

from edgehold.kernel.vmanager import DEVICE, Cap, Flag, Info, Manager, PartitionHandle, mask_of
from edgehold.testing import load
from edgehold.testing.capability import missing, need_command

ROOT = Path(__file__).resolve().parents[3]
_MODEL = ROOT / "tests" / "vmanager"
_UAPI = ROOT / "ext" / "uapi"
_DEVICE = "EDGEHOLD_VMANAGER"
_CONTROL = "EDGEHOLD_VMANAGER_CONTROL"

PATIENCE_S = 60
"""How long a test waits for what has to happen."""
MEMORY = 64 << 20
"""Bytes of a partition made by `make`."""
_NO_FLAGS = Flag(0)
_KERNEL = bytes(0x202) + b"HdrS"  # the mark of an x86 kernel (Documentation/arch/x86/boot.rst)

Kind = Literal["double", "module"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The device that the tests of this process have, and what of it can be made to fail."""

    path: Path
    kind: Kind
    control: Path | None = None
    """The directory of the double's faults and log."""

    @classmethod
    def here(cls) -> Self | None:
        """As the environment says; None outside."""
        if not (path := os.environ.get(_DEVICE)):
            return None
        control = os.environ.get(_CONTROL)
        return cls(path=Path(path), kind="double" if control else "module", control=Path(control) if control else None)

    def environment(self) -> dict[str, str]:
        """For a process that shall find it by `here`."""
        control = {} if self.control is None else {_CONTROL: str(self.control)}
        return {_DEVICE: str(self.path), **control}

    def partition(self, partition: int) -> Path:
        """The node of one partition. The double opens it, but it can't be listed or looked at (stat(2))."""
        return self.path.with_name(f"vman{partition}")

    def fail(self, call: str, error: int, *, at: int = 1, after: bool = False) -> None:
        """Let the ``at``-th call from now (0: every one) end in this errno, before or after it was carried out.

        ``call``: a name of the header without ``VMAN_``, or ``open``.
        """
        self._tell(f"{call} {at} {error} {'after' if after else 'before'}")

    def hang(self, call: str, *, at: int = 1, after: bool = False) -> None:
        """Let that call not return until `clear`, which gives it EIO; a signal that kills ends it too."""
        self._tell(f"{call} {at} hang {'after' if after else 'before'}")

    def clear(self) -> None:
        """No faults any more."""
        self._tell("clear")

    def calls(self) -> list[tuple[str, int]]:
        """What was answered so far: names as in `fail`, errno or 0."""
        with contextlib.suppress(FileNotFoundError):
            lines = (self._directory() / "log").read_text(encoding="ascii").splitlines()
            return [(name, int(error)) for name, error in (line.split() for line in lines)]
        return []

    def _tell(self, line: str) -> None:
        with (self._directory() / "faults").open("a", encoding="ascii") as file:
            file.write(f"{line}\n")

    def _directory(self) -> Path:
        if self.control is None:
            raise RuntimeError("only the double can be made to fail")
        return self.control


@dataclass(frozen=True, slots=True, kw_only=True)
class Double:
    """A compiled double and its directory; each `command` is a firmware of its own, which ends with the command."""

    program: Path
    device: Device

    @classmethod
    def build(cls, directory: Path) -> Self:
        """Compile it into an empty directory, where its device is too."""
        if platform.machine() != "x86_64":
            missing("the double knows the system calls of x86-64 alone")
        program = directory / "double"
        source = _MODEL / "double.c"
        options = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", f"-I{_UAPI}", f"-I{_MODEL}"]
        subprocess.run([need_command("gcc", "gcc"), *options, "-o", program, source], check=True)
        path = directory / "vmanager"
        path.touch()  # so that it is there for whoever looks before it opens
        return cls(program=program, device=Device(path=path, kind="double", control=directory))

    def command(self, argv: Sequence[str], *, caps: Cap | None = None, cpus: Iterable[int] | None = None) -> list[str]:
        """``argv`` with the device. Run it with `Device.environment`. ``caps``, ``cpus``: else the model's own."""
        options = ["--device", str(self.device.path)]
        options += ["--faults", str(self.device.control) + "/faults", "--log", str(self.device.control) + "/log"]
        if caps is not None:
            options += ["--caps", str(int(caps))]
        if cpus is not None:
            options += ["--cpus", str(mask_of(cpus))]
        return [str(self.program), *options, "--", *argv]

    def run(
        self,
        argv: Sequence[str],
        *,
        caps: Cap | None = None,
        cpus: Iterable[int] | None = None,
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 300.0,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, its output in one piece."""
        return subprocess.run(
            self.command(argv, caps=caps, cpus=cpus),
            env={**os.environ, **(environment or {}), **self.device.environment()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )


def build_module(directory: Path) -> Path:
    """The kernel module for the test kernel (``make testkernel``); loading it makes /dev/vmanager.

    Its parameters are ``caps`` and ``cpus``, as masks.
    """
    script = Path(os.environ.get("BUILD", ROOT / "build")) / "testkernel" / "module.sh"
    if not script.exists():
        missing(f"the test kernel is not built: {script} (run: make testkernel)")
    flags = f"KCFLAGS=-I{_UAPI} -I{_MODEL} -Werror"
    done = subprocess.run(
        [script, _MODEL / "module", directory, flags], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"the module does not compile:\n{done.stdout}{done.stderr}")
    return directory / "vmanager_model.ko"


MODULE_DEVICE = Device(path=DEVICE, kind="module")


# What cases share.


def image(content: bytes = _KERNEL, *, size: int = 4096) -> int:
    """A memory file to deploy, padded to ``size`` bytes; without arguments the model takes it for a kernel."""
    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    os.write(fd, content)
    os.truncate(fd, max(size, len(content)))
    return fd


def make(
    manager: Manager, *, cpus: tuple[int, ...] = (1,), partition: int = 0, flags: Flag = _NO_FLAGS
) -> PartitionHandle:
    """A small partition."""
    created = manager.create(memory_bytes=MEMORY, cpus=cpus, partition=partition, flags=flags)
    if created.handle is None:
        raise AssertionError("create returned no descriptor")
    return created.handle


def clean(manager: Manager) -> None:
    """End and destroy every partition, whoever made it."""
    while (partition := manager.next()) is not None:
        with manager.open_partition(partition) as handle, contextlib.suppress(OSError):
            handle.shutdown(force=True)
        manager.destroy(partition)


def need(info: Info, *caps: Cap) -> None:
    """Pass a case over that this firmware can't run."""
    for cap in caps:
        if cap not in info.caps:
            pytest.skip(f"this firmware has no {cap.name}")


def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what has to happen."""
    load.eventually(condition, timeout_s=PATIENCE_S, what="what this test waits for")


@contextlib.contextmanager
def refused(number: int) -> Iterator[None]:
    """The block ends in this errno."""
    with pytest.raises(OSError) as caught:  # noqa: PT011 - which one is what the next line asks
        yield
    if caught.value.errno != number:
        raise AssertionError(f"{caught.value} where {os.strerror(number)} was expected")


@contextlib.contextmanager
def waiting(call: Callable[[], object]) -> Iterator[list[int]]:
    """A call that waits, in a thread: its errno or 0, once it has returned, which the block has to bring about."""
    result: list[int] = []

    def attempt() -> None:
        try:
            call()
        except OSError as error:
            result.append(error.errno or -1)
        else:
            result.append(0)

    thread = threading.Thread(target=attempt)
    thread.start()
    try:
        yield result
    finally:
        thread.join(PATIENCE_S)
    if thread.is_alive():
        raise AssertionError("the call does not return")
