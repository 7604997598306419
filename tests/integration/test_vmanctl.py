"""vmanctl with a real vmand and real guests: a shell on the console, the short commands, a shutdown that takes long."""

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

from edgehold.api.vmand import State, wait_for_state
from edgehold.testing.partitions import PrivateVmand
from tests.unit.vmanctl_fake import Done, Terminal, ended, environment, start
from tests.unit.vmanctl_fake import vmanctl as run

ROOT = Path(__file__).parents[2]
CMDLINE = "quiet no_timer_check tsc=reliable panic=-1"
UP = "edgehold-guest up"


async def did(vmand: PrivateVmand, *words: object) -> str:
    """What a command printed that did what it was asked for."""
    done = await run(vmand.socket, *words)
    assert (done.status, done.err) == (0, ""), done
    return done.out.strip()


async def started(vmand: PrivateVmand, image: tuple[Path, Path], name: str, *, cmdline: str = CMDLINE) -> int:
    """A shared partition with a guest."""
    return int(
        await did(
            vmand, "start", "--name", name, "--cores=1", "--memsize=0.125", "--mode=shared",
            "--kernel", image[0], "--initrd", image[1], "--cmdline", cmdline,
        )
    )  # fmt: skip


async def test_a_shell_on_the_console(vmand: PrivateVmand, image: tuple[Path, Path]) -> None:
    one = await started(vmand, image, "shell", cmdline=f"{CMDLINE} edgehold.shell=ttyS0")
    terminal = Terminal()
    try:
        fd = terminal.fd
        process = await start(vmand.socket, "console", "shell", stdin=fd, stdout=fd, stderr=fd)
        await terminal.until("^] ends it")
        await terminal.is_raw()
        await terminal.until(UP)
        await terminal.until("# ")
        terminal.type(b"echo $((41 + 1))-and-more\r")
        await terminal.until("42-and-more")
        terminal.type(b"no such \x03")  # the guest's ^C, not ours: it ends the line there
        terminal.type(b"echo $((42 + 1))-and-more\r")
        await terminal.until("43-and-more")
        terminal.type(b"\x1d")
        assert (await ended(process)).status == 0
        assert terminal.attributes() == terminal.before
        await terminal.until("vmanctl console shell comes back")
        assert "43-and-more" in await did(vmand, "console", one, "--tail")

        # It comes back with what was there, and ends with the guest.
        process = await start(vmand.socket, "console", one, stdin=fd, stdout=fd, stderr=fd)
        await terminal.until("43-and-more")
        assert await did(vmand, "shutdown", "--force", "shell") == f"partition {one}: READY"
        await terminal.until(f"the console has ended; vmanctl status {one} says why")
        assert (await ended(process)).status == 0
        assert terminal.attributes() == terminal.before
        process = await start(vmand.socket, "console", one, stdin=fd, stdout=fd, stderr=fd)
        await terminal.until("no guest is there to talk to")
        assert (await ended(process)).status == 1
    finally:
        terminal.close()
    await did(vmand, "destroy", "shell")
    assert vmand.remains() == []


async def test_start_leaves_nothing_when_the_guest_can_t_be_deployed(vmand: PrivateVmand) -> None:
    done = await run(vmand.socket, "start", "--cores=1", "--memsize=0.125", "--mode=shared", "--kernel", vmand.socket)
    assert done.status == 64
    assert done.err.endswith("partition 1 is destroyed again\n")
    assert json.loads(await did(vmand, "list", "--json")) == []
    assert vmand.remains() == []


async def test_a_partition_that_is_changed_loaded_and_left(vmand: PrivateVmand, image: tuple[Path, Path]) -> None:
    one = (await did(vmand, "create", "--cores=1", "--memsize=0.125", "--mode=shared", "--name=first")).strip()
    assert await did(vmand, "change", "first", "--name=second", "--memsize=0.25") == f"partition {one}: READY"
    seen = json.loads(await did(vmand, "--json", "status", "second"))
    assert (seen["id"], seen["memory_bytes"]) == (int(one), 256 << 20)
    deaf = f"{CMDLINE} rdinit=/bin/sh"
    guest = ("--kernel", image[0], "--initrd", image[1], "--cmdline", deaf)
    assert await did(vmand, "deploy", "second", *guest, "--paused") == f"partition {one}: SUSPENDED"
    assert await did(vmand, "restore", "second") == f"partition {one}: DEPLOYED"
    done = await run(vmand.socket, "shutdown", "second", "--leave", "--timeout=0.1")
    assert (done.status, done.out) == (75, "")
    assert done.err.startswith("vmanctl: timeout: shutdown: the guest did not power off within 0.1 s; it goes on")
    done = await run(vmand.socket, "change", "second", "--cores=2")
    assert (done.status, "is DEPLOYED; change-partition needs READY" in done.err) == (1, True)
    await did(vmand, "shutdown", "second", "--force")
    await did(vmand, "destroy", "second")


async def test_a_shutdown_that_is_interrupted_goes_on(vmand: PrivateVmand, image: tuple[Path, Path]) -> None:
    one = await started(vmand, image, "deaf", cmdline=f"{CMDLINE} rdinit=/bin/sh")  # nobody there reads the button
    process = await start(vmand.socket, "shutdown", one, "--timeout=600")
    async with await vmand.client() as client:
        await wait_for_state(client, one, State.BUSY, timeout_s=60)
    assert "BUSY (shutdown)" in await did(vmand, "list")
    process.send_signal(signal.SIGINT)
    assert await ended(process) == Done(130, "", f"vmand goes on with it: vmanctl status {one}\n")
    assert json.loads(await did(vmand, "--json", "status", "deaf"))["command"] == "shutdown"
    assert (await did(vmand, "shutdown", one, "--force")).startswith(f"partition {one}: READY")
    assert await did(vmand, "destroy", "deaf") == f"partition {one} is gone"


async def test_events(vmand: PrivateVmand, image: tuple[Path, Path]) -> None:
    one = await started(vmand, image, "told")
    events = await start(vmand.socket, "events", "told")
    assert events.stdout is not None
    first = asyncio.create_task(events.stdout.readline())
    try:
        async with asyncio.timeout(60):
            while not first.done():  # nothing tells when it listens
                await did(vmand, "suspend", "told")
                await did(vmand, "restore", "told")
            assert await first in {f"{one} state SUSPENDED\n".encode(), f"{one} state DEPLOYED\n".encode()}
            await did(vmand, "shutdown", "told", "--force")
            await did(vmand, "destroy", "told")
            lines = [await events.stdout.readline()]
            while not lines[-1].endswith(b" gone\n"):
                lines.append(await events.stdout.readline())
        assert f"{one} state BUSY shutdown\n".encode() in lines
        assert f"{one} state READY\n".encode() in lines
    finally:
        first.cancel()
        events.send_signal(signal.SIGINT)
        assert (await ended(events)).status == 130


async def test_looking(vmand: PrivateVmand, image: tuple[Path, Path]) -> None:
    one = await started(vmand, image, "seen")
    async with await vmand.client() as client:
        status = await wait_for_state(client, one, State.DEPLOYED, timeout_s=60)
    assert (await did(vmand, "list")).splitlines()[1].split()[:6] == [
        str(one),
        "seen",
        "DEPLOYED",
        "shared",
        "any",
        "1",
    ]
    assert (await did(vmand, "vcpus", "seen")).splitlines()[0].split() == ["VCPU", "TID"]
    rows = dict(line.split(maxsplit=1) for line in (await did(vmand, "status", "seen")).splitlines())
    assert (rows["id"], rows["accelerator"], rows["pid"]) == (str(one), "tcg", str(status.pid))
    found = (await did(vmand, "doctor")).splitlines()
    levels = [line.split()[0] for line in found if not line.startswith(" ")]
    assert levels == sorted(levels, key=["missing", "limited", "good"].index)
    assert json.loads(await did(vmand, "doctor", "--json"))
    assert "backend" in await did(vmand, "capabilities")


async def test_bash_completes_names(vmand: PrivateVmand, tmp_path: Path) -> None:
    """As a person has it: the script is evaluated, and its function is asked for the words of a line."""
    await did(vmand, "create", "--cores=1", "--memsize=0.125", "--mode=shared", "--name=alpha")
    await did(vmand, "create", "--cores=1", "--memsize=0.125", "--mode=shared", "--name=alto")
    script = tmp_path / "completion"
    script.write_text(await did(vmand, "completion", "bash"))
    line = f"""
        source {script}
        COMP_WORDS=(vmanctl status al) COMP_CWORD=2 COMPREPLY=()
        _vmanctl_completion vmanctl
        echo "${{COMPREPLY[@]}}"
    """
    process = await asyncio.create_subprocess_exec(
        "bash", "--norc", "-c", line,
        env=environment(vmand.socket, {"PATH": f"{_with_vmanctl(tmp_path)}:/usr/bin:/bin"}),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert await ended(process) == Done(0, "alpha alto\n", "")


def _with_vmanctl(directory: Path) -> Path:
    program = directory / "bin" / "vmanctl"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m vmand.cli "$@"\n')
    program.chmod(0o755)
    return program.parent
