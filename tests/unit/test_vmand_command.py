"""What a guest's command line, its files and the KVM probe look like."""

import asyncio
import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from edgehold.api.vmand import Mode, Nic
from edgehold.errors import DeniedError, TimedOutError
from edgehold.testing.capability import missing
from edgehold.wire.jsonlines import Request
from edgehold.wire.peer import Peer, Role
from vmand.api import Api
from vmand.backend import console, kvm, kvmprobe, process, qmp
from vmand.backend.command import Files, Machine, MemoryBacking, kernel_cmdline, ports, qemu_argv
from vmand.config import Config
from vmand.model import Found, Images, OpenDisk, OpenFile, Record

if TYPE_CHECKING:
    from edgehold.wire.control import Connection
    from vmand.service import Service

RECORD = Record(id=7, uuid="u", name="n", mode=Mode.SHARED, cores=3, memory_bytes=64 << 20, run="r-u-n")


def argv_of(images_: Images, *, arch: str = "x86_64", accelerator: str = "tcg", lock: bool = False) -> list[str]:
    return qemu_argv(
        Machine(qemu="qemu", arch=arch, accelerator=accelerator),
        RECORD,
        images_,
        files=Files(kernel=Path("/run/x/p/7/kernel"), initrd=Path("/run/x/p/7/initrd")),
        memory=MemoryBacking(path=Path("/m/a,b.mem"), lock=lock),
        directory=Path("/run/x/p/7"),
    )


NO_FILE = OpenFile(fd=-1, name="f")
DISK = OpenDisk(file=NO_FILE, format="raw", readonly=False)


def images_of(**rest: Any) -> Images:
    return Images(kernel=NO_FILE, **rest)


@pytest.mark.parametrize(
    ("arch", "given", "made"),
    [
        ("x86_64", "", "console=ttyS0"),
        ("x86_64", "quiet", "quiet console=ttyS0"),
        ("x86_64", "console=hvc0 quiet", "console=hvc0 quiet"),
        ("x86_64", "x.console=y", "x.console=y console=ttyS0"),
        ("aarch64", "", "console=ttyAMA0"),
        ("aarch64", "console=tty1,9", "console=tty1,9"),
    ],
)
def test_a_console_is_added_only_where_none_is_named(arch: str, given: str, made: str) -> None:
    assert kernel_cmdline(given, arch=arch) == made


def test_the_command_line_names_run_and_places() -> None:
    argv = argv_of(images_of(cmdline="a,b"))
    assert process.run_of(argv) == "r-u-n"
    assert "-S" in argv
    joined = " ".join(argv)
    assert "mem-path=/m/a,,b.mem," in joined
    assert "path=/run/x/p/7/qmp.sock," in joined
    assert "-m 64M" in joined
    assert "-overcommit mem-lock=off" in joined
    assert "cpus=3" in joined
    assert argv[argv.index("-append") + 1] == "a,b console=ttyS0"
    assert argv[argv.index("-kernel") + 1] == "/run/x/p/7/kernel"
    assert argv[argv.index("-initrd") + 1] == "/run/x/p/7/initrd"
    assert "-dtb" not in argv
    assert "agent.sock" not in joined
    assert "virtio" not in joined
    assert "pcie-root-port" not in joined
    assert "mem-lock=on" in " ".join(argv_of(images_of(), lock=True))


@pytest.mark.parametrize(
    ("arch", "accelerator", "words"),
    [
        ("x86_64", "tcg", ["-machine q35,", "-cpu max", "-accel tcg,thread=multi,tb-size=128", "-device pvpanic "]),
        ("x86_64", "kvm", ["-machine q35,", "-cpu host", "-accel kvm "]),
        ("aarch64", "tcg", ["-machine virt,", "gic-version=3", "-cpu cortex-a72", "-device pvpanic-pci "]),
        ("aarch64", "kvm", ["-machine virt,", "gic-version=3", "-cpu host", "-accel kvm "]),
    ],
)
def test_each_machine_has_its_own_words(arch: str, accelerator: str, words: list[str]) -> None:
    joined = " ".join(argv_of(images_of(), arch=arch, accelerator=accelerator))
    for word in [*words, "memory-backend=ram", "usb=off", "-nodefaults", "-sandbox on,obsolete=deny,"]:
        assert word in joined


def test_a_device_tree_is_handed_on() -> None:
    argv = qemu_argv(
        Machine(qemu="qemu", arch="aarch64", accelerator="tcg"),
        RECORD,
        images_of(),
        files=Files(kernel=Path("/k"), dtb=Path("/d")),
        memory=MemoryBacking(path=Path("/m")),
        directory=Path("/r"),
    )
    assert argv[argv.index("-dtb") + 1] == "/d"
    assert "-initrd" not in argv


@pytest.mark.parametrize(
    ("cmdline", "virtio"),
    [
        ("", False),
        ("console=ttyS0", False),
        ("console=hvc0", True),
        ("console=ttyS0,115200 console=hvc0,9", True),  # the last one is the guest's /dev/console
        ("console=hvc0 console=ttyS0", False),
        ("xconsole=hvc0", False),
        ("console=hvc1", False),
    ],
)
def test_the_console_is_where_the_guest_writes(cmdline: str, *, virtio: bool) -> None:
    joined = " ".join(argv_of(images_of(cmdline=cmdline)))
    assert ("-serial chardev:console" in joined) is not virtio
    assert ("virtconsole,bus=serial.0,chardev=console" in joined) is virtio


def test_the_agent_has_a_port_by_name_and_a_socket() -> None:
    joined = " ".join(argv_of(images_of(agent=True, cmdline="console=hvc0")))
    assert joined.count("-device virtio-serial-pci,id=serial") == 1
    assert "socket,id=agent,path=/run/x/p/7/agent.sock,server=on,wait=off" in joined
    assert "virtserialport,bus=serial.0,chardev=agent,name=org.qemu.guest_agent.0" in joined


def test_as_many_ports_as_devices() -> None:
    made = images_of(disks=(DISK, DISK), nics=(Nic(bridge="br0"),), vsock=True)
    assert ports(made) == 4
    found = [one for one in argv_of(made) if one.startswith("pcie-root-port")]
    assert [one.split(",")[1:3] for one in found] == [[f"id=port{n}", f"chassis={n + 1}"] for n in range(4)]


NOBODY = Peer(1, 65534, 65534, frozenset({65534}))


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
    api = Api(cast("Service", None), config=Config(), host_cores=1)
    with caplog.at_level("INFO"), pytest.raises(DeniedError):
        await api.handle(cast("Connection", connection), Request("deploy", {"id": told}, 1))
    (line,) = [one for one in caplog.records if one.name == "vmand.api"]
    assert line.getMessage().startswith("deploy - by uid=65534")
    assert line.partition == "-"  # type: ignore[attr-defined]
    caplog.clear()
    with caplog.at_level("INFO"), pytest.raises(DeniedError):
        await api.handle(cast("Connection", connection), Request("deploy", {"partition_id": 7}, 1))
    assert "deploy 7 by uid=65534" in caplog.text


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
    monkeypatch.setattr(process, "_REAP_S", 0.01)
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

    def on_event(name: str) -> None:
        listens.set()
        if name == "STOP":
            raise ValueError("a bug")

    async with await asyncio.start_unix_server(qemu, tmp_path / "s"):
        one = qmp.Monitor(tmp_path / "s", who="partition 1", timeout_s=5, on_event=on_event)
        await asyncio.wait({one.task}, timeout=5)
        assert one.task.done()
        with pytest.raises(ValueError, match="a bug"):
            one.task.result()
