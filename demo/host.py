"""What the host is, and what is left on it: the same questions before and after the demo."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

from edgehold.kernel import capacity

SCHED_DEADLINE = 6
_POLICY = 41 - 3  # field 41 of /proc/PID/task/TID/stat (proc(5)), counted behind the name in parentheses


@dataclass(frozen=True, slots=True)
class Traces:
    """What a run could leave behind."""

    deadline_threads: frozenset[int]
    cgroups: frozenset[str]
    capacity: float
    resolution: float


def traces() -> Traces:
    """Look at threads, cgroups and the admission bandwidth."""
    found = capacity.probe()
    return Traces(frozenset(_deadline_threads()), frozenset(_cgroups()), found.available, found.resolution)


def left_behind(before: Traces, after: Traces, directory: Path | None) -> list[str]:
    """What the run left, in words; nothing if it left nothing."""
    said = [f"thread {tid} is still in SCHED_DEADLINE" for tid in after.deadline_threads - before.deadline_threads]
    said += [f"cgroup {path}" for path in after.cgroups - before.cgroups]
    if directory is not None:
        said += [f"process {pid}: {command}" for pid, command in processes_of(directory)]
    lost = before.capacity - after.capacity
    if lost > 2 * before.resolution:
        said.append(f"admission bandwidth: {before.capacity:.3f} CPUs before, {after.capacity:.3f} after")
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


def _deadline_threads() -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/task/[0-9]*/stat"):
        try:
            fields = stat.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[_POLICY]) == SCHED_DEADLINE:
            found.add(int(stat.parent.name))
    return found


def _cgroups() -> set[str]:
    """The cgroups that could be ours; a host makes and removes others at any time."""
    return {path for path, _dirs, _files in os.walk("/sys/fs/cgroup") if "vmand" in path or "deadlined" in path}
