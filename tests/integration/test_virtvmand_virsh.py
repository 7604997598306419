"""virsh, unmodified, against a real virtvmand and vmand: every command that is served, and those that are refused.

The dialogues are in `tests.libvirt.rows`; both forms of the URI hold each. EDGEHOLD_VIRSH: see `tests.libvirt.virsh`.
"""

import asyncio
import grp
import re
import shlex
import signal
import subprocess
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from edgehold.testing.capability import need_command, need_open_root, need_root
from edgehold.testing.daemons import private_directory
from edgehold.testing.partitions import PrivateVmand, destroy_all, private_vmand
from edgehold.testing.virtvmand import PLAIN_URI, PrivateVirtvmand, private_virtvmand
from tests.libvirt.guest import printed
from tests.libvirt.row import LIVELY, NEVER, QUIET, Row
from tests.libvirt.rows import ONCE, SECTIONS
from tests.libvirt.virsh import ANOTHER, CMDLINE, Virsh, definition, environment, need_virsh, squeezed
from tests.unit.vmanctl_fake import Done, Terminal, ended

SOON_S = 60.0
NOBODY = 65534
# virsh hands a file to it, and looks whether it has changed.
EDITOR = """#!/bin/sh
exec sed -i '/<title>edited/!s|<name>other</name>|<name>other</name><title>edited</title>|' "$1"
"""
DEVICES = """
    <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='/nowhere/disk.raw'/>
      <target dev='vda' bus='virtio'/></disk>
    <interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='nowhere'/>
      <model type='virtio'/></interface>"""
DISK = "<disk type='file' device='disk'><source file='/nowhere/d'/><target dev='vdb' bus='virtio'/></disk>"


def files(image: tuple[Path, Path]) -> Mapping[str, str]:
    """What the rows give to virsh."""
    return {
        "quiet.xml": definition("quiet", uuid=QUIET, devices=DEVICES),
        "other.xml": definition("other"),
        "kvm.xml": definition("also", kind="kvm"),
        "qemu.xml": definition("and", kind="qemu"),
        "same-name.xml": definition("quiet", uuid=NEVER),
        "same-uuid.xml": definition("another", uuid=QUIET),
        "broken.xml": definition("broken")[:-20],
        "graphics.xml": definition("seen", devices="<graphics type='vnc'/>"),
        "disk.xml": DISK,
        "lively.xml": definition("lively", uuid=LIVELY, boot=image),
        "brief.xml": definition("brief", boot=image),
        "talks.xml": definition("talks", boot=image, cmdline=f"{CMDLINE} edgehold.shell=ttyS0"),
    }


@dataclass(frozen=True, slots=True)
class Host:
    """Both daemons."""

    vmand: PrivateVmand
    daemon: PrivateVirtvmand


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def host() -> AsyncIterator[Host]:
    """Once for all rows: that thousands of calls leave both daemons well is a part of what is held."""
    need_virsh()
    need_root()
    need_command("qemu-system-x86_64", "qemu-system-x86")
    async with private_vmand(settings={"accelerator": "tcg"}) as vmand, private_virtvmand(vmand) as daemon:
        yield Host(vmand, daemon)
        assert daemon.running, daemon.log_text()[-3000:]
        assert "Traceback" not in daemon.log_text()
        assert await daemon.stop() == 0
    assert vmand.guests() == vmand.of_users() == []


@pytest_asyncio.fixture
async def home(host: Host, image: tuple[Path, Path]) -> AsyncIterator[Path]:
    """virsh's home, with the files that rows name; no partition is left."""
    home = host.daemon.directory / "home"
    home.mkdir(exist_ok=True)
    for name, text in files(image).items():
        (home / name).write_text(text)
    (home / "editor").write_text(EDITOR)
    (home / "editor").chmod(0o755)
    yield home
    await destroy_all(host.vmand)


@pytest.fixture(params=[False, True], ids=["socket", "plain"])
def virsh(host: Host, home: Path, request: pytest.FixtureRequest) -> Virsh:
    """virsh with one form of the URI."""
    return Virsh(daemon=host.daemon, home=home, plain=request.param)


class Dialogue:
    """The rows of a section, one after the other; what was wrong with each is gathered."""

    def __init__(self, host: Host, virsh: Virsh) -> None:
        self._host = host
        self._virsh = virsh
        self._texts = {"dir": str(virsh.home), "uri": virsh.uri()}
        self.wrong: list[str] = []

    async def hold(self, row: Row) -> None:
        """One row."""
        name, pattern = row.shown
        try:
            if name:
                await printed(self._host.vmand, name, pattern)
            done, faults = await self._ask(row)
            if row.until:
                async with asyncio.timeout(SOON_S):
                    while faults:  # asks again: nothing tells of it
                        await asyncio.sleep(0.1)
                        done, faults = await self._ask(row)
        except (AssertionError, TimeoutError) as error:
            self.wrong.append(f"virsh {row.line}: {error!r}")
            return
        if row.keep:
            self._texts[row.keep] = done.out.strip()
        if faults:
            self.wrong.append(f"virsh {row.line}: {'; '.join(faults)}\n    {done}")

    async def _ask(self, row: Row) -> tuple[Done, list[str]]:
        words = shlex.split(self._known(row.line))
        editor = {"EDITOR": str(self._virsh.home / "editor")}
        done = await self._virsh(*words, read_only=row.read_only, more=editor)
        said = squeezed(done.out + done.err)
        faults = [f"status {done.status}"] if row.status is not None and done.status != row.status else []
        faults += [f"no {one!r}" for one in map(self._known, row.says) if not re.search(one, said, re.MULTILINE)]
        faults += [f"has {one!r}" for one in map(self._known, row.lacks) if re.search(one, said, re.MULTILINE)]
        return done, faults

    def _known(self, text: str) -> str:
        for name, known in self._texts.items():
            text = text.replace(f"@{name}@", known)
        return text


async def hold(host: Host, virsh: Virsh, section: str) -> None:
    """A whole section."""
    dialogue = Dialogue(host, virsh)
    for row in SECTIONS[section]:
        await dialogue.hold(row)
    assert not dialogue.wrong, f"{len(dialogue.wrong)} of {len(SECTIONS[section])} rows:\n" + "\n".join(dialogue.wrong)


@pytest.mark.parametrize("section", [one for one in SECTIONS if one not in ONCE])
async def test_every_command(host: Host, virsh: Virsh, section: str) -> None:
    await hold(host, virsh, section)


@pytest.mark.parametrize("section", ONCE)
async def test_every_command_that_takes_long(host: Host, home: Path, section: str) -> None:
    await hold(host, Virsh(daemon=host.daemon, home=home), section)


async def test_a_shell_on_the_console(host: Host, virsh: Virsh) -> None:
    """It is typed to and heard; ^] leaves it and the guest goes on; its end is the console's end."""
    await virsh.did(f"create {virsh.home}/talks.xml")
    terminal = Terminal()
    try:
        for answer in ("42", "43"):
            fd = terminal.fd
            process = await virsh.start("console", "talks", stdin=fd, stdout=fd, stderr=fd)
            await terminal.until("Escape character is ^]")
            await terminal.is_raw()
            await printed(host.vmand, "talks")
            # A shell that is only starting throws away what was typed before it asked.
            await terminal.until("# ")
            terminal.type(f"echo $(({answer} + 0))-and-more\r".encode())
            await terminal.until(f"{answer}-and-more")
            terminal.type(b"\x1d")
            assert (await ended(process)).status == 0
            assert terminal.attributes() == terminal.before
            assert await virsh.did("domstate talks") == "running"
        process = await virsh.start("console", "talks", stdin=fd, stdout=fd, stderr=fd)
        await terminal.until("Escape character is ^]")
        await terminal.is_raw()
        await virsh.did("destroy talks")
        assert (await ended(process)).status == 0
        assert terminal.attributes() == terminal.before
    finally:
        terminal.close()


async def test_events(virsh: Virsh) -> None:
    """`event --all` tells of each transition, in order."""
    await virsh.did(f"define {virsh.home}/lively.xml")
    await virsh.did("start lively")
    terminal = Terminal()
    process = await virsh.start("event", "--all", "--loop", stdin=terminal.fd, stdout=terminal.fd, stderr=terminal.fd)
    heard = asyncio.create_task(terminal.until("event 'lifecycle' for domain 'lively': Suspended Paused"))
    try:
        async with asyncio.timeout(SOON_S):
            while not heard.done():  # nothing tells when it listens
                await virsh.did("suspend lively")
                await virsh.did("resume lively")
        await heard
        for line, said in (
            ("reset lively", "event 'reboot' for domain 'lively'"),
            ("destroy lively", "event 'lifecycle' for domain 'lively': Stopped Destroyed"),
            ("undefine lively", "event 'lifecycle' for domain 'lively': Undefined Removed"),
            (f"define {virsh.home}/quiet.xml", "event 'lifecycle' for domain 'quiet': Defined Added"),
            ("desc quiet --config --new-desc words", "event 'metadata-change' for domain 'quiet'"),
            ("setmaxmem quiet 192M --config", "event 'lifecycle' for domain 'quiet': Defined Updated"),
            (f"create {virsh.home}/brief.xml", "event 'lifecycle' for domain 'brief': Started Booted"),
            ("destroy brief", "event 'lifecycle' for domain 'brief': Stopped Destroyed"),
            ("undefine quiet", "event 'lifecycle' for domain 'quiet': Undefined Removed"),
        ):
            await virsh.did(line)
            await terminal.until(said)
        process.send_signal(signal.SIGINT)
        await terminal.until("events received: ")
        assert (await ended(process)).status == 0
        assert "'brief': Undefined" not in terminal.shown
    finally:
        heard.cancel()
        if process.returncode is None:
            process.kill()
            await process.wait()
        terminal.close()


async def test_an_event_is_waited_for_in_vain(virsh: Virsh) -> None:
    done = await virsh("event", "--event", "lifecycle", "--timeout", "1")
    assert (done.status, "event loop timed out" in done.out) == (1, True)


async def test_several_commands_of_one_session(virsh: Virsh) -> None:
    done = await virsh(f"define {virsh.home}/quiet.xml; list --all; domstate nobody; undefine quiet; list --all")
    assert re.findall(r"^- quiet shut off$", squeezed(done.out), re.MULTILINE) == ["- quiet shut off"]
    assert "failed to get domain 'nobody'" in done.err


async def test_the_default_uri(host: Host, virsh: Virsh) -> None:
    """As docs say that one may set it."""
    await virsh.did(f"define {virsh.home}/quiet.xml")
    for name in ("VIRSH_DEFAULT_CONNECT_URI", "LIBVIRT_DEFAULT_URI"):
        done = await virsh("list", "--all", "--name", uri="", more={name: virsh.uri()})
        assert (done.status, done.out.strip()) == (0, "quiet")
    assert host.daemon.running


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("vman:///session?socket=@", "session|system"),
        ("vman:///other?socket=@", "other|system"),
        ("vman:///?socket=@", "system"),
        ("vman:///system?socket=/nowhere/sock", "/nowhere/sock"),
        ("vman://localhost/system?socket=@", "."),
    ],
)
async def test_other_uris_are_refused(host: Host, home: Path, uri: str, said: str) -> None:
    done = await Virsh(daemon=host.daemon, home=home)("list", uri=uri.replace("@", str(host.daemon.socket)))
    assert done.status == 1
    assert re.search(said, done.err)
    assert "cause is unknown" not in done.err


@pytest.mark.parametrize("plain", [False, True], ids=["socket", "plain"])
async def test_a_daemon_that_is_away(host: Host, home: Path, tmp_path: Path, *, plain: bool) -> None:
    """What a user sees who has not started it: where it was looked for, or that libvirt knows no such driver."""
    away = PrivateVirtvmand(tmp_path, vmand_socket=host.vmand.socket)
    away.sockets.mkdir()
    done = await Virsh(daemon=away, home=home, plain=plain)("list")
    assert (done.status, "libvirt/" in done.err) == (1, True), done
    if plain:
        done = await Virsh(daemon=away, home=home, plain=True)("list", uri=f"{PLAIN_URI}?mode=direct")
        assert (done.status, "virtvmand-sock" in done.err) == (1, True), done


@pytest.mark.parametrize(
    ("role", "looks", "changes", "why"),
    [
        ("", False, False, "Permission denied"),
        ("read", True, False, "may only look|read only|forbidden"),
        ("operate", True, True, ""),
    ],
)
@pytest.mark.usefixtures("home")  # it destroys what they define
async def test_users_that_are_not_root(host: Host, *, role: str, looks: bool, changes: bool, why: str) -> None:
    """By their group; what they may not is refused with a reason."""
    if ANOTHER:
        pytest.skip("EDGEHOLD_VIRSH is run as root")
    need_open_root()
    need_command("setpriv", "util-linux")
    group = grp.getgrgid(NOBODY).gr_name
    with private_directory("eh-lu-") as directory:
        directory.chmod(0o711)
        settings = {"access": {role: [group]}} if role else {}
        daemon = PrivateVirtvmand(directory, vmand_socket=host.vmand.socket, settings=settings)
        await daemon.start()
        try:
            for read_only in (False, True):
                uri = daemon.read_only_uri if read_only else daemon.uri
                xml = directory / f"{read_only}.xml"
                xml.write_text(definition(f"of-{read_only}"))
                for words, right in (("list --all", looks), (f"define {xml}", changes and not read_only)):
                    argv = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "virsh"]
                    argv += [*(["-r"] if read_only else []), "-c", uri, *words.split()]
                    process = await asyncio.create_subprocess_exec(
                        *argv, env=environment(Path("/nonexistent")), stdout=subprocess.PIPE, stderr=subprocess.PIPE
                    )
                    done = await ended(process)
                    assert (done.status == 0) == right, (words, done)
                    assert right or read_only or re.search(why, done.err), (words, done)
        finally:
            await daemon.stop()
