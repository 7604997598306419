"""Keeps interrupts and the kernel's unbound work away from the cores of deployed dedicated partitions.

What was found is written to a file before the first change: also a vmand that was killed puts everything back as it
was, when the last such partition is gone. What the kernel refuses is counted, not an error: a driver that manages its
interrupts itself keeps them. Sources: irq/irq-affinity.rst and workqueue.rst in Documentation/core-api.
"""

import errno
import logging
import os
from collections import Counter
from pathlib import Path

import msgspec

from edgehold.kernel.procfs import boot_id
from vmand.backend.topology import write
from vmand.model import parse_cores
from vmand.placement import as_list

log = logging.getLogger(__name__)

FILE = "steering.json"
_MANAGED = "the kernel keeps them where their driver wants them"
_WORD = 32  # bits of a mask between two commas


class Found(msgspec.Struct, kw_only=True):
    """What was there before vmand changed it."""

    boot: str
    """The boot's id: after another boot all of it means nothing."""
    interrupts: dict[int, str] = msgspec.field(default_factory=dict)
    """By number, as lists of cores; only those that were changed."""
    default: str = ""
    """The mask of interrupts to come."""
    work: str = ""
    """The mask of unbound workqueues."""


class Steering:
    """The host's interrupts and workqueues."""

    def __init__(
        self,
        *,
        runtime: Path,
        online: frozenset[int],
        proc: Path = Path("/proc"),
        sys: Path = Path("/sys"),
        boot: str | None = None,
    ) -> None:
        """``runtime``: vmand's runtime directory. ``online``: the host's cores."""
        self._file = runtime / FILE
        self._online = online
        self._irq = proc / "irq"
        self._work = sys / "devices/virtual/workqueue"
        self._boot = boot_id() if boot is None else boot
        self._found = self._kept()
        self._cores: frozenset[int] = frozenset()
        self._refused: dict[Path, str] = {}
        self._problem = ""

    def apply(self, cores: frozenset[int]) -> None:
        """These cores, and no others, are kept free from now on. None: as `restore`."""
        if not cores:
            self.restore()
            return
        if not self._online - cores:
            self._problem = "no core would be left for interrupts"
            return
        self._cores, self._problem = cores, ""
        now, old = self._now(), self._found
        default, work = old.default or now.default, old.work or now.work
        # What is gone is forgotten: its number may come back as another device's.
        known = now.interrupts | {n: text for n, text in old.interrupts.items() if n in now.interrupts}
        needed = Found(
            boot=self._boot,
            interrupts={number: text for number, text in known.items() if parse_cores(text) & cores},
            default=default if _mask(default) & cores else "",
            work=work if _mask(work) & cores else "",
        )
        both = Found(
            boot=self._boot,
            interrupts=old.interrupts | needed.interrupts,
            default=old.default or needed.default,
            work=old.work or needed.work,
        )
        try:
            self._keep(both)
            self._move(now)
            self._keep(needed)
        except OSError as error:
            self._problem = f"{self._file}: {error.strerror}, so interrupts stay where they are"
            log.warning("%s", self._problem)
        if self._refused:
            log.info("%s", self.said())

    def restore(self) -> None:
        """All as it was before the first `apply`, also that of an earlier vmand. Idempotent."""
        self._cores, self._problem = frozenset(), ""
        self._move(self._now())
        self._found = Found(boot=self._boot)
        try:
            self._file.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s: %s", self._file, error.strerror)

    def said(self) -> str:
        """What is moved and what could not be, for a person; empty while nothing is to be moved."""
        if self._problem or not self._cores:
            return self._problem
        said = f"interrupts and unbound kernel work are kept off cores {as_list(self._cores)}"
        for reason, count in sorted(Counter(self._refused.values()).items()):
            said += f"; {count} can't be moved: {reason}"
        stay = [n for n, text in self._now().interrupts.items() if parse_cores(text) & self._cores]
        if back := sum(self._affinity(number) not in self._refused for number in stay):
            said += f"; {back} came back or are new (does irqbalance run? set its IRQBALANCE_BANNED_CPULIST)"
        return said

    def _without(self, cores: frozenset[int]) -> frozenset[int]:
        """Where something may run that could run on these: at least on the cores that nobody has for himself."""
        return cores - self._cores if cores & self._online - self._cores else self._online - self._cores

    def _now(self) -> Found:
        """What is set at present, of every interrupt."""
        try:
            names = os.listdir(self._irq)  # noqa: PTH208 - names are enough
        except OSError:
            names = []
        texts = {int(one): _text(self._affinity(int(one))) for one in names if one.isdigit()}
        return Found(
            boot=self._boot,
            interrupts={number: text for number, text in sorted(texts.items()) if text},
            default=_text(self._irq / "default_smp_affinity"),
            work=_text(self._work_read()),
        )

    def _move(self, now: Found) -> None:
        """Set what was found, without the cores that are to be free now."""
        self._refused.clear()
        for number, text in self._found.interrupts.items():
            wanted = self._without(parse_cores(text))
            if number in now.interrupts and parse_cores(now.interrupts[number]) != wanted:
                self._write(self._affinity(number), as_list(wanted))
        for path, text, was in (
            (self._irq / "default_smp_affinity", self._found.default, now.default),
            (self._work / "cpumask", self._found.work, now.work),
        ):
            if text and _mask(was) != (wanted := self._without(_mask(text))):
                self._write(path, _as_mask(wanted))

    def _write(self, path: Path, text: str) -> None:
        try:
            write(path, text)
        except FileNotFoundError:
            pass  # its device is gone
        except OSError as error:
            # ENOSPC: no free vector is left on the other cores.
            managed = error.errno in {errno.EIO, errno.EPERM}  # the latter since Linux 6.12, for a process with rights
            self._refused[path] = _MANAGED if managed else os.strerror(error.errno or errno.EIO)

    def _affinity(self, number: int) -> Path:
        return self._irq / str(number) / "smp_affinity_list"

    def _work_read(self) -> Path:
        """Since Linux 6.8 ``cpumask`` lacks the cores of isolated cpusets; what was asked for is in another file."""
        requested = self._work / "cpumask_requested"
        return requested if requested.exists() else self._work / "cpumask"

    def _kept(self) -> Found:
        try:
            found = msgspec.json.decode(self._file.read_bytes(), type=Found)
            for text in found.interrupts.values():
                parse_cores(text)
            for mask in (found.default, found.work):
                _mask(mask)
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
            log.warning("%s can't be used, interrupts stay where they are: %s", self._file, error)
        else:
            if found.boot == self._boot:
                return found
        return Found(boot=self._boot)

    def _keep(self, found: Found) -> None:
        if found != self._found:
            new = self._file.with_suffix(".new")
            new.write_bytes(msgspec.json.encode(found))
            new.replace(self._file)
            self._found = found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""


def _mask(text: str) -> frozenset[int]:
    """``f,ffffffff`` as the kernel writes masks of cores."""
    bits = int(text.replace(",", "") or "0", 16)
    return frozenset(core for core in range(bits.bit_length()) if bits >> core & 1)


def _as_mask(cores: frozenset[int]) -> str:
    bits = sum(1 << core for core in cores)
    words: list[str] = []
    while bits or not words:
        words.append(f"{bits & (1 << _WORD) - 1:08x}")
        bits >>= _WORD
    return ",".join(reversed(words))
