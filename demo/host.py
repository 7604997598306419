"""What the host is, and what is left on it: the same questions before and after the demo."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from edgehold.errors import UnavailableError
from edgehold.kernel import capacity
from edgehold.testing.load import accounted, available, deadline_threads, settled


@dataclass(frozen=True, slots=True)
class Traces:
    """What a run could leave behind."""

    deadline_threads: frozenset[int]
    cgroups: frozenset[str]
    capacity: float
    """What the kernel would still admit, in CPUs."""
    accounted: float
    """That, and what living threads hold: others on the host may come and go meanwhile."""


def traces() -> Traces:
    """Look at threads, cgroups and the admission bandwidth.

    Raises:
        EdgeholdError: the bandwidth can't be probed; the text says why.
    """
    try:
        whole = settled(accounted)
    except AssertionError as error:
        raise UnavailableError(f"other programs change their reservations all the time: {error}") from None
    return Traces(frozenset(deadline_threads()), frozenset(_cgroups()), available(), whole)


def left_behind(before: Traces, after: Traces, *, directory: Path | None, held: set[int]) -> list[str]:
    """What the run left, in words, of its directory's processes and the threads that it held; nothing if nothing."""
    said = [f"thread {tid} is in SCHED_DEADLINE" for tid in sorted(after.deadline_threads & held)]
    said += [f"cgroup {path}" for path in after.cgroups - before.cgroups]
    if directory is not None:
        said += [f"process {pid}: {command}" for pid, command in processes_of(directory)]
    if before.accounted - after.accounted > 2 * capacity.RESOLUTION:
        said.append(f"admission bandwidth: {before.accounted:.3f} CPUs before, {after.accounted:.3f} after")
    return said


def processes_of(directory: Path) -> list[tuple[int, str]]:
    """The processes (not this one) whose command line names the directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:  # it ended meanwhile
            continue
        if str(directory) in command:
            found.append((int(entry.name), command))
    return found


def facts() -> dict[str, str]:
    """The host, for the report."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    runtime = Path("/proc/sys/kernel/sched_rt_runtime_us").read_text().strip()
    return {
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": f"{os.cpu_count()} x {model}",
        "memory": f"{pages / 2**30:.1f} GiB",
        "load before": " ".join(f"{one:.2f}" for one in os.getloadavg()),
        "sched_rt_runtime_us": runtime,
        "Python": platform.python_version(),
    }


def _cgroups() -> set[str]:
    """The cgroups that could be ours; a host makes and removes others at any time."""
    return {path for path, _dirs, _files in os.walk("/sys/fs/cgroup") if "vmand" in path or "deadlined" in path}
