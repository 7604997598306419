"""Disks for tests/system/vm.py: a root file system from a tar file, or files put into an image that somebody built.

Neither needs a loop device or a mount: mke2fs(8) copies a directory, debugfs(8) writes into a file system in a file.
Needs root, for the owners of files. `need_machine` makes those of our own tests, below ``BUILD`` (default: build), and
again when anything that they are made of has changed.
"""

import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from edgehold.testing.capability import missing, need_command, need_root
from tests.system.vm import PORT, Machine

_ROOT = Path(__file__).parents[2]
_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
_EMULATOR = {"amd64": ("qemu-system-x86_64", "qemu-system-x86"), "arm64": ("qemu-system-aarch64", "qemu-system-arm")}
# What our packages depend on, so that they can be installed without a network; and what tests look with.
_PACKAGES = ("dbus", "iproute2", "kmod", "procps", "python3", "qemu-utils", "systemd", "systemd-sysv", "udev")
_EX_IMPOSSIBLE = 77
_BUILD_S = 3600.0
_AGENT = "/usr/local/lib/edgehold-test/agent.py"
_UNIT = "edgehold-test-agent.service"
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_TIMEOUT_S = 600.0


def agent_files() -> Mapping[str, bytes]:
    """What lets a machine answer: the agent and its unit, by path. `agent_link` is still to be made."""
    unit = f"""\
[Unit]
Description=commands of the tests, through {PORT}
DefaultDependencies=no
After=systemd-remount-fs.service

[Service]
ExecStart=/usr/bin/python3 -I {_AGENT}
Restart=on-failure
"""
    return {
        _AGENT: (Path(__file__).parent / "vmagent.py").read_bytes(),
        f"/etc/systemd/system/{_UNIT}": unit.encode(),
    }


AGENT_LINK = (f"/etc/systemd/system/multi-user.target.wants/{_UNIT}", f"/etc/systemd/system/{_UNIT}")
"""A link and where it leads: it enables the agent's unit."""


def make_disk(
    tar: Path, disk: Path, *, size_mib: int = 1536, modules: Path | None = None, files: Mapping[str, bytes | Path] = {}
) -> None:
    """Make an ext4 file system of ``size_mib`` (a sparse file) with the contents of ``tar``, and the agent.

    ``modules`` becomes /lib/modules; ``files`` are further ones, by path. ``disk`` appears whole or not at all.
    """
    disk.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".disk-", dir=disk.parent) as name:
        root, new = Path(name, "root"), Path(name, "disk")
        root.mkdir(mode=0o755)
        _call("tar", "-C", str(root), "--numeric-owner", "--xattrs", "--xattrs-include=*", "-xf", str(tar))
        for path, contents in {**agent_files(), **files}.items():
            target = root / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(contents, Path):
                shutil.copyfile(contents, target)
            else:
                target.write_bytes(contents)
        if modules is not None:
            shutil.copytree(modules, root / "usr/lib/modules", dirs_exist_ok=True, symlinks=True)
        link = root / AGENT_LINK[0].lstrip("/")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(AGENT_LINK[1])
        _call("mke2fs", "-q", "-F", "-t", "ext4", "-d", str(root), str(new), f"{size_mib}M")
        new.replace(disk)


def add_agent(disk: Path, *, offset: int = 0) -> None:
    """Put the agent into the ext4 file system that begins at byte ``offset`` of an image."""
    with tempfile.TemporaryDirectory(prefix="eh-agent-") as name:
        commands: list[str] = []
        made: set[str] = set()
        for path, contents in agent_files().items():
            source = Path(name, str(len(commands)))
            source.write_bytes(contents)
            source.chmod(stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IROTH)
            commands += [*_directories(path, made), f"write {shlex.quote(str(source))} {path}"]
        commands += [*_directories(AGENT_LINK[0], made), f"symlink {AGENT_LINK[0]} {AGENT_LINK[1]}"]
        script = Path(name, "commands")
        script.write_text("\n".join([*commands, ""]), encoding="utf-8")
        # It reports what went wrong, but always ends with 0. That a directory is already there is no fault.
        said = _call("debugfs", "-w", "-f", str(script), f"{disk}?offset={offset}")
        listed = _call("debugfs", "-R", f"stat {AGENT_LINK[0]}", f"{disk}?offset={offset}")
        if "symlink" not in listed:
            raise RuntimeError(f"debugfs did not put the agent into {disk}:\n{said}\n{listed}")


def _directories(path: str, made: set[str]) -> list[str]:
    parents = [str(one) for one in reversed(Path(path).parents) if str(one) != "/" and str(one) not in made]
    made.update(parents)
    return [f"mkdir {one}" for one in parents]


def _call(*argv: str) -> str:
    environment = {**os.environ, "PATH": _PATH, "LC_ALL": "C"}
    ended = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S, env=environment)
    if ended.returncode != 0:
        raise RuntimeError(f"{argv[0]}: status {ended.returncode}: {ended.stderr[-2000:]}")
    return ended.stdout + ended.stderr


def packages(suite: str, arch: str) -> list[Path]:
    """Our package files; the test is skipped (or fails, see `missing`) where there are none.

    Below ``EDGEHOLD_DEBS``, by default where `make deb` puts them.
    """
    built = Path(os.environ.get("EDGEHOLD_DEBS", _ROOT / "build" / "deb"))
    for place in (built / suite / arch, built / f"{suite}-{arch}", built / suite, built):
        if list(place.glob(f"edgehold-vmand_*_{arch}.deb")):
            return sorted(place.glob("edgehold*.deb"))
    return missing(f"no packages for {suite}, {arch} in {built} (run: make deb DIST={suite} ARCH={arch})")


def need_machine(
    arch: str, *, installed: bool, cpus: int, memory_mib: int, files: Mapping[str, bytes | Path] = {}
) -> Machine:
    """A Debian 12 of an architecture, with our packages ``installed``, or else as files in /root/debs.

    The test is skipped (or fails, see `missing`) where this host can't make or run it. What is not cached takes one
    minute, for another architecture than the host's a quarter of an hour.
    """
    need_root()
    need_command(*_EMULATOR[arch])
    need_command("qemu-img", "qemu-utils")
    debs = packages("bookworm", arch)
    build = Path(os.environ.get("BUILD", _ROOT / "build")).absolute()
    _script("images/vm/build.sh", ARCH=arch)
    boot = build / "vm" / arch
    tar = build / "rootfs" / f"vm-bookworm-{arch}{'-edgehold' if installed else ''}.tar"
    options = [word for deb in debs for word in ("--deb", str(deb))] if installed else []
    _script("images/rootfs.sh", "bookworm", arch, str(tar), *options, *_PACKAGES, _EMULATOR[arch][1])
    if not installed:
        files = {**files, **{f"/root/debs/{deb.name}": deb for deb in debs}}
    disk = tar.with_suffix(".ext4")
    key = _hash([Path(f"{tar}.manifest"), boot / "manifest", Path(__file__), *agent_files().values()], files)
    mark = disk.with_suffix(".key")
    if not (disk.exists() and mark.exists() and mark.read_text(encoding="ascii") == key):
        mark.unlink(missing_ok=True)
        make_disk(tar, disk, modules=boot / "modules", files=files)
        mark.write_text(key, encoding="ascii")
    return Machine(
        arch=arch,
        disk=disk,
        kernel=boot / "vmlinuz",
        initrd=boot / "initramfs.gz",
        cpus=cpus,
        memory_mib=memory_mib,
    )


def _script(name: str, *arguments: str, **environment: str) -> None:
    ended = subprocess.run(
        [_ROOT / name, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=_BUILD_S,
        env={**os.environ, **environment},
    )
    if ended.returncode == _EX_IMPOSSIBLE:
        missing(ended.stdout.strip()[-500:])
    if ended.returncode != 0:
        raise RuntimeError(f"{name}: status {ended.returncode}:\n{ended.stdout[-3000:]}")


def _hash(parts: Sequence[bytes | Path], files: Mapping[str, bytes | Path]) -> str:
    whole = hashlib.sha256()
    for part in (*parts, *(one for path in sorted(files) for one in (path.encode(), files[path]))):
        data = part.read_bytes() if isinstance(part, Path) else part
        whole.update(len(data).to_bytes(8, "big") + data)
    return whole.hexdigest()
