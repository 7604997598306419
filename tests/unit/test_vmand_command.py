"""What a guest's command line, its files and the KVM probe look like."""

import asyncio
import errno
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from edgehold.api.vmand import Mode
from edgehold.errors import BadRequestError, DeniedError, FailedError, SettingsError, TimedOutError, UnsupportedError
from edgehold.testing.capability import missing
from edgehold.wire.jsonlines import Request
from edgehold.wire.peer import Peer, Role
from vmand import cli
from vmand.api import Api
from vmand.backend import console, images, kvm, kvmprobe, launcher, memory, qmp
from vmand.backend.command import kernel_cmdline, qemu_argv
from vmand.model import Found, Images, Record

if TYPE_CHECKING:
    from edgehold.wire.control import Connection
    from vmand.service import Service

RECORD = Record(id=7, uuid="u", name="n", mode=Mode.SHARED, cores=3, memory_bytes=64 << 20, run="r-u-n")


@pytest.mark.parametrize(
    ("given", "made"),
    [
        ("", "console=ttyS0"),
        ("quiet", "quiet console=ttyS0"),
        ("console=hvc0 quiet", "console=hvc0 quiet"),
        ("x.console=y", "x.console=y console=ttyS0"),
    ],
)
def test_a_console_is_added_only_where_none_is_named(given: str, made: str) -> None:
    assert kernel_cmdline(given) == made


def test_the_command_line_names_run_and_places() -> None:
    argv = qemu_argv(
        "qemu",
        RECORD,
        Images(kernel="/k", initrd="/i"),
        accelerator="tcg",
        memory=Path("/m/a,b.mem"),
        directory=Path("/run/x/p/7"),
    )
    assert launcher.run_of(argv) == "r-u-n"
    assert "-S" in argv
    joined = " ".join(argv)
    assert "mem-path=/m/a,,b.mem," in joined
    assert "path=/run/x/p/7/qmp.sock," in joined
    assert "-m 64M" in joined
    assert "cpus=3" in joined
    assert argv[argv.index("-append") + 1] == "console=ttyS0"
    assert argv[argv.index("-initrd") + 1] == "/i"


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    path = tmp_path / "kernel"
    path.write_bytes(b"k")
    return path


ROOT_PEER = Peer(1, 0, 0, frozenset({0}))
NOBODY = Peer(1, 65534, 65534, frozenset({65534}))


def check(
    kernel: Path | str, *, initrd: Path | str = "", dtb: str = "", cmdline: str = "", peer: Peer = ROOT_PEER
) -> tuple[bytes, Images]:
    """What QEMU would read, and the images."""
    with images.opened(
        kernel=str(kernel), initrd=str(initrd), dtb=dtb, cmdline=cmdline, limit_mib=1, peer=peer
    ) as made:
        return Path(made.kernel).read_bytes(), made


def test_good_images(kernel: Path) -> None:
    content, made = check(kernel, cmdline="quiet")
    assert content == b"k"
    assert (made.initrd, made.cmdline) == ("", "quiet")
    assert not Path(made.kernel).exists()  # closed with the block


def test_bad_images_are_named_with_the_cure(kernel: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match=r"kernel: .*not an absolute path"):
        check("Image")
    with pytest.raises(BadRequestError, match=r"kernel: .*not an absolute path"):
        check("/a\0b")
    with pytest.raises(BadRequestError, match=r"kernel: .*No such file"):
        check(tmp_path / "none")
    with pytest.raises(BadRequestError, match=r"initrd: .*not a regular file"):
        check(kernel, initrd=tmp_path)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(BadRequestError, match=r"initrd: .*not a regular file"):
        check(kernel, initrd=fifo)
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(BadRequestError, match="has 0 bytes"):
        check(empty)
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate((1 << 20) + 1)
    with pytest.raises(BadRequestError, match="1 to 1 MiB are allowed"):
        check(large)
    with pytest.raises(UnsupportedError, match="takes no device tree"):
        check(kernel, dtb="/d")


def test_what_is_no_regular_file_is_never_opened(tmp_path: Path) -> None:
    """A writer that waits for a FIFO's reader would be let go by an open; so would a device be touched."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(BadRequestError):
        check(fifo)
    with pytest.raises(OSError, match="No such device"):  # ENXIO: no reader is there, and the attempt leaves none
        os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    real, seen = os.open, []

    def watched(path: object, flags: int, *args: Any, **options: Any) -> int:
        seen.append(flags)
        return real(path, flags, *args, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", watched)
        with pytest.raises(BadRequestError):
            check("/dev/null")
    assert all(flags & os.O_PATH for flags in seen)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everybody may search, unlike pytest's own."""
    if not all(Path(one).stat().st_mode & 0o001 for one in ("/", "/tmp")):
        pytest.skip("the root directory here is closed to other users: no caller but root can name any file")
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


def test_a_caller_gives_a_guest_only_what_the_caller_may_read(public: Path) -> None:
    kernel = public / "kernel"
    kernel.write_bytes(b"k")
    kernel.chmod(0o644)
    assert check(kernel, peer=NOBODY)[0] == b"k"
    secret = public / "secret"
    secret.write_bytes(b"s")
    secret.chmod(0o600)
    hidden = public / "hidden"
    hidden.mkdir(mode=0o700)
    (hidden / "file").write_bytes(b"h")
    (hidden / "file").chmod(0o644)
    link, sly = public / "link", hidden / "sly"
    link.symlink_to(hidden / "file")
    sly.symlink_to(kernel)
    texts = set()
    for path in (secret, hidden / "file", hidden / "none", public / "none", link, sly, hidden):
        with pytest.raises(DeniedError, match=r"initrd: .* can't be read by uid 65534") as caught:
            check(kernel, initrd=path, peer=NOBODY)
        texts.add(str(caught.value).replace(str(path), "PATH"))
    assert len(texts) == 1  # it does not tell what is there
    secret.chmod(0o640)
    gid = secret.stat().st_gid
    assert check(kernel, initrd=secret, peer=Peer(1, 65534, 65534, frozenset({65534, gid})))[0] == b"k"
    secret.chmod(0o604)  # its group may not, and is in that class before it is among the others
    with pytest.raises(DeniedError):
        check(kernel, initrd=secret, peer=Peer(1, 65534, 65534, frozenset({gid})))


def test_what_was_checked_is_what_is_read(public: Path) -> None:
    kernel, secret = public / "kernel", public / "secret"
    kernel.write_bytes(b"k")
    kernel.chmod(0o644)
    secret.write_bytes(b"s")
    secret.chmod(0o600)
    with images.opened(kernel=str(kernel), initrd="", dtb="", cmdline="", limit_mib=1, peer=NOBODY) as made:
        kernel.unlink()
        kernel.symlink_to(secret)
        assert Path(made.kernel).read_bytes() == b"k"


def test_an_error_of_qemu_has_the_callers_names(kernel: Path) -> None:
    with (
        pytest.raises(FailedError, match=f"could not load {kernel}"),
        images.opened(kernel=str(kernel), initrd="", dtb="", cmdline="", limit_mib=1, peer=ROOT_PEER) as made,
    ):
        raise FailedError(f"could not load {made.kernel}")


def uid_of(path: Path, uid: int) -> None:
    try:
        os.chown(path, uid, uid)
    except PermissionError:
        missing("needs root")


def test_only_our_own_regular_file_is_a_partitions_memory(tmp_path: Path) -> None:
    files = memory.MemoryFiles(tmp_path)
    assert not files.has("u", 3)
    files.path("other").write_bytes(b"abc")
    files.path("u").symlink_to(files.path("other"))
    assert not files.has("u", 3)
    files.give_back("u")
    assert files.has("other", 3)
    assert not files.has("other", 4)
    uid_of(files.path("other"), 65534)
    assert not files.has("other", 3)


def test_memory_that_can_not_be_looked_at_is_an_error_for_people(tmp_path: Path) -> None:
    files = memory.MemoryFiles(tmp_path / "none")
    with pytest.raises(FailedError, match="see memory_dir"):
        files.free_bytes(0)
    with pytest.raises(FailedError, match="see memory_dir"):
        files.sweep(())
    (tmp_path / "u.mem").mkdir()
    with pytest.raises(FailedError, match="can't be removed"):
        memory.MemoryFiles(tmp_path).give_back("u")


MOUNTS = r"""22 1 254:1 / / rw - ext4 /dev/vda1 rw
25 22 0:22 / /dev/shm rw shared:3 - tmpfs tmpfs rw
26 25 254:1 /x /dev/shm/disk\040one rw - xfs /dev/vdb rw
27 22 0:25 / /srv rw - ext4 /dev/vdc rw
28 22 0:26 / /srv rw master:1 - hugetlbfs none rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/x", "ext4"),
        ("/dev/shm/vmand", "tmpfs"),
        ("/dev/shmx", "ext4"),
        ("/dev/shm/disk one/m", "xfs"),
        ("/srv/m", "hugetlbfs"),
    ],
)
def test_the_file_system_of_a_path(path: str, kind: str, tmp_path: Path) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(MOUNTS)
    assert memory.filesystem(Path(path), mountinfo) == kind


def test_memory_on_a_disk_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"memory_dir: /proc is on proc; .* tmpfs"):
        memory.check_directory(Path("/proc"))


@pytest.mark.parametrize(
    ("word", "found"),
    [("suspended", Found.RUNNING)]
    + [(one, Found.PAUSED) for one in ("inmigrate", "postmigrate", "finish-migrate", "save-vm", "restore-vm", "colo")],
)
def test_every_state_of_qemu_has_a_meaning(word: str, found: Found) -> None:
    assert qmp.STATUS[word] is found


async def test_a_console_that_does_not_connect_is_a_timeout_of_ours(tmp_path: Path) -> None:
    one = console.Console(tmp_path / "none", lambda _text: None, who="partition 1")
    with pytest.raises(TimedOutError, match="console of partition 1"):
        await one.wait_connected(0.01)
    await one.close()


async def test_a_process_that_can_not_be_watched_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_pid: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    assert launcher.Process.open(2**22 + 1, "r") is None
    monkeypatch.setattr(os, "pidfd_open", full)
    with pytest.raises(FailedError, match="can't be watched: Too many open files"):
        launcher.Process.open(os.getpid(), "r")
    with pytest.raises(FailedError, match="can't be watched"):
        launcher.spawn(["sleep", "99"], log_file=Path("/dev/null"), cpus=os.sched_getaffinity(0))
    with pytest.raises(ChildProcessError):  # no child is left that nobody watches
        os.waitpid(-1, os.WNOHANG)  # noqa: ASYNC222 - it does not wait


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


async def test_systemd_gets_dollars_twice_and_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def spawn() -> None:
        await launcher.spawn_unit(
            ["qemu$", "-append", "a=$HOME"], run="r", log_file=tmp_path / "log", cpus={0}, unit="u", slice_name="s"
        )

    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FailedError, match="systemd-run can't be started: No such file"):
        await spawn()
    await launcher.stop_unit("u")  # idempotent: what is not there is stopped
    program(tmp_path / "systemd-run", f'for one; do echo "$one"; done > {tmp_path}/said')
    program(tmp_path / "systemctl", "echo 0")
    with pytest.raises(FailedError, match="ended at once"):
        await spawn()
    assert (tmp_path / "said").read_text().splitlines()[-3:] == ["qemu$", "-append", "a=$$HOME"]
    program(tmp_path / "systemctl", "exec /bin/sleep 20")
    monkeypatch.setattr(launcher, "_SYSTEMD_TIMEOUT_S", 0.1)
    with pytest.raises(TimedOutError, match="systemctl did not end within"):
        await launcher.stop_unit("u")


def test_the_systemd_launcher_needs_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "SYSTEMD", tmp_path / "none")
    for setting in ("auto", "process"):
        launcher.check_launcher(setting)
    with pytest.raises(SettingsError, match="launcher: systemd does not run here"):
        launcher.check_launcher("systemd")
    monkeypatch.setattr(launcher, "SYSTEMD", tmp_path)
    launcher.check_launcher("systemd")


def test_the_probe_is_its_source(tmp_path: Path) -> None:
    """Assembling kvmprobe.S anew gives the bytes that are run."""
    if shutil.which("as") is None or shutil.which("ld") is None:
        missing("as and ld are not installed (Debian package binutils)")
    source = Path(kvm.__file__).parent / "kvmprobe.S"
    subprocess.run(["as", "--64", "-o", tmp_path / "p.o", source], check=True)
    subprocess.run(
        ["ld", "-Ttext=0xF0000", "--oformat", "binary", "-o", tmp_path / "p.bin", tmp_path / "p.o"], check=True
    )
    assert (tmp_path / "p.bin").read_bytes() == kvm.image()
    assert len(kvm.image()) == 65536
    assert kvm.image().startswith(kvmprobe.CODE)


@pytest.mark.parametrize(
    ("status", "letters", "complaint", "expected"),
    [
        (33, "RPLHSTU", "", ""),
        (None, "RPLH", "", "at the CPU's own speed"),
        (None, "", "", "within 5 s a tiny guest did not run in real mode"),
        (0, "RPLHST", "", "CPU was reset when it should run user mode"),
        (1, "", "no permission", "QEMU can't use it: no permission"),
        (-6, "", "", "QEMU can't use it: status -6"),
        (None, "RPLHSTU", "", "leave"),
    ],
)
def test_verdicts(status: int | None, letters: str, complaint: str, expected: str) -> None:
    verdict = kvm.verdict(status, letters, complaint)
    assert expected in verdict
    assert bool(verdict) == bool(expected)


@pytest.mark.parametrize("told", ["x\nNov 21 vmand: forged", [1], {"a": 1}, True, 0, -1, 2**63, None, 1.5])
async def test_only_an_id_comes_into_the_journal(told: object, caplog: pytest.LogCaptureFixture) -> None:
    """A refused request's arguments are anybody's text."""
    connection = SimpleNamespace(peer=NOBODY, role=Role.NONE)
    api = Api(cast("Service", None), image_limit_mib=1, host_cores=1)
    with caplog.at_level("INFO"), pytest.raises(DeniedError):
        await api.handle(cast("Connection", connection), Request("deploy", {"id": told}, 1))
    (line,) = [one for one in caplog.records if one.name == "vmand.api"]
    assert line.getMessage().startswith("deploy - by uid=65534")
    assert line.partition == "-"  # type: ignore[attr-defined]
    caplog.clear()
    with caplog.at_level("INFO"), pytest.raises(DeniedError):
        await api.handle(cast("Connection", connection), Request("deploy", {"partition_id": 7}, 1))
    assert "deploy 7 by uid=65534" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("memory_bytes", 256 << 20, "268435456 (256 MiB)"),
        ("memory_bytes", 3 << 29, "1610612736 (1.50 GiB)"),
        ("pid", None, "-"),
        ("unit", "", "-"),
        ("cpus", (), "-"),
        ("cpus", (1, 3), "1,3"),
        ("secure", False, "false"),
        ("boot_count", 0, "0"),
    ],
)
def test_fields_as_people_read_them(name: str, value: object, text: str) -> None:
    assert cli._shown(name, value) == text


async def test_a_probe_that_outlives_its_kill_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that hangs in /dev/kvm."""
    killed = []

    async def forever() -> None:
        await asyncio.Event().wait()

    async def start(*_argv: str, **_options: object) -> object:
        return SimpleNamespace(
            returncode=None, communicate=forever, wait=forever, kill=lambda: killed.append(True), pid=1
        )

    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    monkeypatch.setattr(kvm, "_DEADLINE_S", 0.01)
    monkeypatch.setattr(launcher, "_REAP_S", 0.01)
    async with asyncio.timeout(5):
        said = await kvm.Accelerators("qemu", "auto", cache=Path("/none"))._try()
    assert "did not run in real mode" in said
    assert killed == [True]


async def test_a_bug_in_the_handling_of_an_event_ends_the_monitors_task(tmp_path: Path) -> None:
    """And so is noticed: without it, events would be lost and nobody would know."""
    greeting = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}

    listens = asyncio.Event()

    async def qemu(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(json.dumps(greeting).encode() + b"\r\n")
        asked = json.loads(await reader.read(4096))  # it ends with no line break
        writer.write(json.dumps({"return": {}, **({"id": asked["id"]} if "id" in asked else {})}).encode() + b"\r\n")
        await listens.wait()  # what comes before somebody listens is nobody's: CONNECTED says so
        writer.write(b'{"event": "STOP", "timestamp": {"seconds": 1, "microseconds": 2}}\r\n')
        await reader.read()
        writer.close()

    def on_event(name: str, _data: dict[str, Any]) -> None:
        listens.set()
        if name == "STOP":
            raise ValueError("a bug")

    async with await asyncio.start_unix_server(qemu, tmp_path / "s"):
        one = qmp.Monitor(tmp_path / "s", who="partition 1", timeout_s=5, on_event=on_event)
        await asyncio.wait({one.task}, timeout=5)
        assert one.task.done()
        with pytest.raises(ValueError, match="a bug"):
            one.task.result()
