"""What every benchmark shares: figures beside their bars, percentiles, a guest's lines, and where results go."""

import asyncio
import json
import math
import os
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgehold.api.vmand import VmandClient
from edgehold.cli import table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "build/bench"
GUEST = Path(os.environ.get("BUILD", ROOT / "build")) / "guest/amd64"
UP = "edgehold-guest up"
CMDLINE = "console=ttyS0 quiet no_timer_check tsc=reliable"
# For a guest's line: an emulated guest on a busy host is slow.
LINE_S = 120.0
_SMALLEST = 0.005  # what is less is shown with more digits


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number and what it is held against."""

    what: str
    value: float
    unit: str
    bar: float | None = None
    at_least: bool = False
    """The bar is a lower bound, not an upper one."""
    note: str = ""

    @property
    def verdict(self) -> str:
        """``met``, ``MISSED``, or nothing where there is no bar."""
        if self.bar is None:
            return ""
        return "met" if (self.value >= self.bar if self.at_least else self.value <= self.bar) else "MISSED"

    def cells(self) -> list[str]:
        """A row of the table."""
        bar = "" if self.bar is None else f"{'>=' if self.at_least else '<='} {self.bar:g}"
        return [self.what, number(self.value), self.unit, bar, self.verdict, self.note]


def number(value: float) -> str:
    """Two digits behind the point, four for what would be nothing then."""
    return f"{value:.2f}" if abs(value) >= _SMALLEST else f"{value:.4f}"


def show(title: str, figures: Sequence[Figure]) -> None:
    """A table on standard output."""
    print(f"\n{title}\n")
    print(table(["WHAT", "VALUE", "UNIT", "BAR", "VERDICT", "NOTE"], [one.cells() for one in figures]), flush=True)


def write(name: str, value: Any) -> None:
    """Results for machines: ``build/bench/NAME.json``."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")


def plain(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    """Figures for `write`."""
    return [asdict(one) | {"verdict": one.verdict} for one in figures]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share (0 to 1) of all does not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


async def timed_ms(call: Callable[[], Awaitable[object]]) -> float:
    """Milliseconds until it is done."""
    begin = time.perf_counter_ns()
    await call()
    return (time.perf_counter_ns() - begin) / 1e6


def cpu_of_command_ms(argv: Sequence[str], *, environment: dict[str, str] | None = None, runs: int = 10) -> float:
    """User and system CPU of a command: the median of some runs (wait4(2)).

    Raises:
        RuntimeError: it failed.
    """
    spent = []
    for _ in range(runs):
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, env={**os.environ, **(environment or {})})
        _pid, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # waited for already
        if process.returncode:
            raise RuntimeError(f"{argv}: exit status {process.returncode}")
        spent.append((usage.ru_utime + usage.ru_stime) * 1000)
    return statistics.median(spent)


def resident_mb(pid: int) -> tuple[float, float]:
    """RSS and PSS of a process in MB (10^6 bytes): /proc/PID/smaps_rollup, proc(5)."""
    rows = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    rss, pss = (int(rows[name].split()[0]) * 1024 / 1e6 for name in ("Rss", "Pss"))
    return rss, pss


def as_installed() -> None:
    """Let everything that is started from now on keep its compiled modules, as an installed package has them."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(RESULTS / "pycache")


def need_guest() -> tuple[Path, Path]:
    """The small guest's kernel and initial RAM disk.

    Raises:
        SystemExit: it is not built, or this is not root.
    """
    if os.geteuid() != 0:
        raise SystemExit("this benchmark runs guests in partitions: it needs root")
    images = GUEST / "vmlinuz", GUEST / "initramfs.gz"
    if not all(one.exists() for one in images):
        raise SystemExit(f"the small guest is not built: {GUEST} (run: make guest)")
    return images


class Lines:
    """The console lines of all partitions of one vmand, as they come."""

    def __init__(self) -> None:
        self._text: dict[int, str] = {}
        self._heard = asyncio.Event()

    def hear(self, partition: int, text: str) -> None:
        """More output."""
        self._text[partition] = self._text.get(partition, "") + text
        self._heard.set()

    def text(self, partition: int) -> str:
        """What a partition printed since `forget`."""
        return self._text.get(partition, "")

    def forget(self, partition: int) -> None:
        """Begin anew."""
        self._text.pop(partition, None)

    async def until(self, partition: int, words: str, *, timeout_s: float = LINE_S) -> None:
        """Until the partition has printed a whole line with these words.

        Raises:
            RuntimeError: it did not in time.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while "\n" not in self.text(partition).partition(words)[2]:
                    self._heard.clear()
                    await self._heard.wait()
        except TimeoutError:
            last = self.text(partition)[-500:]
            raise RuntimeError(f"partition {partition} did not print {words!r} in {timeout_s:g} s: {last!r}") from None


@asynccontextmanager
async def consoles(client: VmandClient) -> AsyncIterator[Lines]:
    """All consoles. The conversation is used for nothing else: its events end here."""
    lines = Lines()

    async def listen() -> None:
        async for event in client.events():
            if event.kind == "console":
                lines.hear(event.partition, event.text)

    await client.subscribe(console=True)
    task = asyncio.create_task(listen())
    try:
        yield lines
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
