"""Runs a command apart from the host: what it mounts is nobody else's, and it can run another architecture's programs.

    python3 images/apart.py [--arch arm64] -- COMMAND...

The command gets a mount namespace whose root is the caller's, also where that is a chroot: mmdebstrap and systemd want
a root that is a mount point. For an architecture that this kernel can't run, it also gets a user namespace (every id is
itself), and in there a binfmt_misc of its own that names qemu-user (Linux 6.7, Debian package qemu-user-static): the
host's table is not touched. Needs root. Exit status: the command's; 77 if this host can't do it, with the reason.
"""

import argparse
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

_CLONE_NEWNS = 0x00020000
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWPID = 0x20000000
_PR_SET_PDEATHSIG = 1
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_PRIVATE = 0x40000
_EX_IMPOSSIBLE = 77
_EX_USAGE = 64
_BINFMT = Path("/proc/sys/fs/binfmt_misc")
# Debian's architecture: what qemu-user's table calls it.
_FOREIGN = {"arm64": "qemu-aarch64", "amd64": "qemu-x86_64"}
_EVERY_ID = "0 0 4294967295"

_libc = ctypes.CDLL(None, use_errno=True)


class ImpossibleError(Exception):
    """This host can't do it; the text says why."""


def _call(what: str, result: int) -> None:
    if result != 0:
        raise ImpossibleError(f"{what}: {os.strerror(ctypes.get_errno())}")


def _mount(source: str | None, target: str, kind: str | None, flags: int = 0) -> None:
    names = [None if one is None else one.encode() for one in (source, target, kind)]
    _call(f"mount {target}", _libc.mount(*names, ctypes.c_ulong(flags), None))


def _enter_own_mounts() -> None:
    """Move into the root of our mount namespace: setns(2) of mounts sets root and working directory to it."""
    with Path("/proc/self/ns/mnt").open("rb") as namespace:
        _call("setns", _libc.setns(namespace.fileno(), _CLONE_NEWNS))


def own_mounts() -> None:
    """A mount namespace of our own, from which nothing reaches the host, and whose root is our root.

    A chroot's root is a directory of the namespace: it becomes the topmost mount of the namespace's root.
    """
    where = Path.cwd()
    _call("unshare", _libc.unshare(_CLONE_NEWNS))
    root = os.open("/", os.O_PATH | os.O_DIRECTORY)
    try:
        before = os.fstat(root)
        _enter_own_mounts()
        _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
        there = os.stat("/")  # noqa: PTH116 - beside os.fstat
        if (before.st_dev, before.st_ino) != (there.st_dev, there.st_ino):
            os.fchdir(root)
            _mount(".", "/", None, _MS_BIND | _MS_REC)
            _enter_own_mounts()
    finally:
        os.close(root)
    os.chdir(where)


def own_ids() -> None:
    """A user namespace, with mounts and processes of its own, in which every id is itself."""
    ready, go = os.pipe(), os.pipe()
    me = os.getpid()
    helper = os.fork()
    if helper == 0:  # only a process outside may write the maps of all ids
        status = 1
        try:
            os.close(ready[1])
            os.close(go[0])
            if os.read(ready[0], 1):
                for name in ("uid_map", "gid_map"):
                    Path(f"/proc/{me}/{name}").write_text(_EVERY_ID, encoding="ascii")
                status = 0
        finally:
            os._exit(status)
    os.close(ready[0])
    os.close(go[1])
    try:
        _call("user namespaces are not possible here", _libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNS | _CLONE_NEWPID))
        os.write(ready[1], b"1")
    finally:
        os.close(ready[1])
        os.close(go[0])
        _, status = os.waitpid(helper, 0)
    if status:
        raise ImpossibleError("the ids of a user namespace can't be mapped here")


def own_table(name: str) -> None:
    """A binfmt_misc of our user namespace that runs one architecture by qemu-user."""
    entry = Path(f"/usr/lib/binfmt.d/{name}.conf")
    if not entry.exists():
        raise ImpossibleError(f"there is no {entry} (Debian package qemu-user-static)")
    lines = [line for line in entry.read_text(encoding="ascii").splitlines() if line.startswith(":")]
    _mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    _mount("binfmt_misc", str(_BINFMT), "binfmt_misc")
    try:
        (_BINFMT / "register").write_text("\n".join(lines), encoding="ascii")
    except OSError as error:
        raise ImpossibleError(f"binfmt_misc can't be ours (it can since Linux 6.7): {error}") from error


def _runs(arch: str) -> bool:
    return subprocess.run(["arch-test", arch], capture_output=True, check=False).returncode == 0


def _wait(child: int) -> NoReturn:
    """End as the child ends. As the first of its processes we reap what others left."""
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def run(command: list[str], arch: str | None) -> NoReturn:
    """Become ``command``, or wait for it.

    Raises:
        ImpossibleError: this host can't.
    """
    own_mounts()
    if arch is None or _runs(arch):
        os.execvp(command[0], command)  # noqa: S606 - that is the purpose
    if arch not in _FOREIGN:
        raise ImpossibleError(f"nobody knows how to run {arch} here")
    own_ids()
    # The first process of the namespace; the second is the command. The first one's end is that of all in there.
    first = os.fork()
    if first == 0:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        try:
            _mount("proc", "/proc", "proc")
            own_table(_FOREIGN[arch])
            if not _runs(arch):
                raise ImpossibleError(f"programs of {arch} do not run although binfmt_misc knows them")
            second = os.fork()
            if second == 0:
                os.execvp(command[0], command)  # noqa: S606 - that is the purpose
        except (ImpossibleError, OSError) as error:
            sys.stderr.write(f"apart: {error}\n")
            os._exit(_EX_IMPOSSIBLE)
        _wait(second)
    _wait(first)


def main() -> int:
    """The command's exit status, or 77."""
    parser = argparse.ArgumentParser(prog="apart.py")
    parser.add_argument("--arch")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.print_usage(sys.stderr)
        return _EX_USAGE
    if os.geteuid() != 0:
        sys.stderr.write("apart: needs root\n")
        return _EX_IMPOSSIBLE
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)  # nobody waits for us any more
    try:
        run(command, options.arch)
    except ImpossibleError as error:
        sys.stderr.write(f"apart: {error}\n")
        return _EX_IMPOSSIBLE


if __name__ == "__main__":
    sys.exit(main())
