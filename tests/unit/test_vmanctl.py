"""vmanctl against a vmand that answers what it is told to: what it asks for, what it prints, how it ends."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import click
import msgspec
import pytest
import pytest_asyncio
from click.testing import CliRunner, Result

from edgehold.api.vmand import Check, CoresGrade, Event, MemoryGrade, State
from edgehold.errors import BadStateError, DeniedError, FailedError, TimedOutError
from tests.unit.vmanctl_fake import PARTITION, FakeVmand, Terminal, ended, fake_vmand, start
from tests.unit.vmanctl_fake import vmanctl as run
from vmand.cli import COMMANDS, SHORT
from vmand.cli import vmanctl as group


@pytest_asyncio.fixture
async def vmand() -> AsyncIterator[FakeVmand]:
    async with fake_vmand() as one:
        yield one


async def invoke(vmand: FakeVmand, *words: str) -> Result:
    """In this process: cheaper, and without what `edgehold.cli.main` makes of errors."""
    arguments = ["--socket", str(vmand.socket), *words]
    return await asyncio.to_thread(CliRunner().invoke, group, arguments)


def test_each_name_is_a_command() -> None:
    context = click.Context(group)
    assert set(group.list_commands(context)) == {*COMMANDS, *SHORT, "completion"}
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        assert command.help, name
        assert command.name == SHORT.get(name, name)
    assert group.get_command(context, "nothing") is None


HERE = str(Path.cwd())
CREATE = ("create-partition", {"cores": 2, "memsize": 1.0, "secure": False, "mode": "dedicated"})


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["create-partition", "-cores", "2", "-memsize", "1", "-secure", "false"], CREATE),
        (["create", "--cores=2", "--memsize=1"], CREATE),
        (
            ["create", "--cores=1", "--memsize=.5", "--strict", "--mode=shared", "--name=web", "-secure=true"],
            ("create-partition",
             {"cores": 1, "memsize": 0.5, "secure": True, "mode": "shared", "name": "web", "strict": True}),
        ),
        (["deploy", "-kernel", "/k", "-dtb", "/d", "1"], ("deploy", {"partition_id": 1, "kernel": "/k", "dtb": "/d"})),
        (["deploy", "web", "--kernel=k"], ("deploy", {"partition_id": "web", "kernel": f"{HERE}/k"})),
        (
            ["deploy", "--kernel=/k", "--initrd=/i", "--cmdline", "-x", "--vsock", "--agent", "--disk", "/a,b",
             "--disk", "/c,format=qcow2,readonly", "--nic", "br0", "--nic", "br1,mac=02:00:00:00:00:01", "--", "2"],
            ("deploy",
             {"partition_id": 2, "kernel": "/k", "initrd": "/i", "cmdline": "-x", "vsock": True, "agent": True,
              "disks": [{"path": "/a,b", "format": "raw", "readonly": False},
                        {"path": "/c", "format": "qcow2", "readonly": True}],
              "nics": [{"bridge": "br0", "mac": ""}, {"bridge": "br1", "mac": "02:00:00:00:00:01"}]}),
        ),
        (["suspend", "2"], ("suspend", {"id": 2})),
        (["restore", "web"], ("restore", {"id": "web"})),
        (["reboot", "2"], ("reboot", {"id": 2})),
        (["reboot", "2", "--graceful", "--timeout=5"], ("reboot", {"id": 2, "graceful": True, "timeout_s": 5.0})),
        (["shutdown", "2", "-timeout", "0"], ("shutdown", {"id": 2, "timeout_s": 0.0})),
        (["shutdown", "2", "-force"], ("shutdown", {"id": 2, "force": True})),
        (["shutdown", "2", "-leave"], ("shutdown", {"id": 2, "leave": True})),
        (["deploy", "2", "--kernel=/k", "--paused"], ("deploy", {"partition_id": 2, "kernel": "/k", "paused": True})),
        (["change", "web", "--name", "db"], ("change-partition", {"id": "web", "name": "db"})),
        (
            ["change-partition", "2", "-cores", "3", "--memsize=.5", "--mode=shared", "-strict=false", "-secure=false"],
            ("change-partition",
             {"id": 2, "cores": 3, "memsize": 0.5, "mode": "shared", "strict": False, "secure": False}),
        ),
        (["vcpus", "9" * 30], ("vcpus", {"id": "9" * 30})),
        (["usage", "2"], ("usage", {"id": 2})),
        (["console", "2", "--tail"], ("console", {"id": 2})),
    ],
)  # fmt: skip
async def test_what_is_typed_is_what_is_asked_for(
    vmand: FakeVmand, words: list[str], asked: tuple[str, dict[str, Any]]
) -> None:
    partition = msgspec.to_builtins(PARTITION)
    vmand.answers |= {"create-partition": {"id": 2}, "vcpus": [], "usage": {}, "console": {"text": ""}}
    vmand.answers["change-partition"] = partition
    done = await invoke(vmand, *words)
    assert (done.exit_code, done.exception) == (0, None), done.output
    assert vmand.asked[0] == asked


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["deploy", "2", "--kernel=/k", "--disk=/a,format=vdi"], "format=vdi: raw or qcow2"),
        (["deploy", "2", "--kernel=/k", "--disk=/a,cache=none"], "'cache=none': what can follow once is"),
        (["deploy", "2", "--kernel=/k", "--disk=/a,readonly,readonly"], "'readonly': what can follow once is"),
        (["deploy", "2", "--kernel=/k", "--nic=br0,vlan=3"], "it is written BRIDGE or BRIDGE,mac=ADDRESS"),
        (["deploy", "2", "--kernel=/k", "--nic="], "it is written BRIDGE"),
        (["deploy", "2"], "Missing option '-kernel'"),
        (["status", ""], "an id or a name is needed"),
        (["reboot", "2", "--timeout=1"], "--timeout is for --graceful"),
        (["console", "2"], "stdin is no terminal; --tail prints"),
        (["--json", "console", "2"], "a terminal is no JSON"),
        (["console", "2", "--escape=^1"], "write ^] for Ctrl and ]"),
        (["create", "--cores=0", "--memsize=1"], "0 is not in the range"),
        (["create", "--cores=1", "--memsize=nan"], "nan is no number"),
        (["create", "--cores=1", "--memsize=0"], "0.0 is not in the range"),
        (["shutdown", "2", "--timeout=nan"], "nan is no number"),
        (["shutdown", "2", "--timeout=inf"], "inf is not in the range 0<=x<=3600"),
        (["create", "--cores=1"], "Missing option '-memsize'"),
        (["shutdown", "2", "--force", "--leave"], "--force ends the guest and --leave never does"),
        (["change", "2"], "nothing is to be changed"),
        (["change", "2", "--strict", "--name=x"], "'--name=x' is not a valid boolean"),
    ],
)
async def test_what_can_t_be_is_told_before_vmand_is_asked(vmand: FakeVmand, words: list[str], text: str) -> None:
    done = await invoke(vmand, *words)
    assert done.exit_code == 2, done.output
    assert text in " ".join(done.output.split())
    assert vmand.asked == []


START = ("start", "--cores=1", "--memsize=1", "--kernel=/k")


async def test_start_creates_and_deploys(vmand: FakeVmand) -> None:
    vmand.answers["create-partition"] = {"id": 7}
    assert (await invoke(vmand, *START)).output == "7\n"
    assert [command for command, _args in vmand.asked] == ["create-partition", "deploy"]


async def test_start_takes_back_what_it_made(vmand: FakeVmand) -> None:
    vmand.answers |= {"create-partition": {"id": 7}, "deploy": DeniedError("kernel: /k can't be read by uid 5")}
    done = await run(vmand.socket, *START)
    assert (done.status, done.out) == (77, "")
    assert done.err == "vmanctl: denied: kernel: /k can't be read by uid 5; partition 7 is destroyed again\n"
    assert vmand.asked[-1] == ("destroy-partition", {"id": 7})
    vmand.answers["destroy-partition"] = BadStateError("partition 7 is BUSY")
    done = await run(vmand.socket, *START)
    assert "partition 7 could not be destroyed again: partition 7 is BUSY" in done.err


async def test_list_and_status(vmand: FakeVmand) -> None:
    shared = msgspec.convert(
        {"id": 10, "name": "b", "uuid": "u", "state": "BUSY", "command": "shutdown", "mode": "shared", "cores": 3,
         "memory_bytes": 1 << 30}, type(PARTITION),
    )  # fmt: skip
    vmand.answers["list"] = [PARTITION, shared]
    assert (await invoke(vmand, "list")).output.splitlines() == [
        "ID  NAME  STATE            MODE       CORES          GIB  MEMORY   REASON",
        " 2  web   DEPLOYED         dedicated  2-3 isolated  0.50  hugetlb  -",
        "10  b     BUSY (shutdown)  shared     any 3         1.00  -        -",
    ]
    vmand.answers["status"] = msgspec.structs.replace(
        PARTITION, state=State.FAILED, reason="it panicked", last_output="one\ntwo"
    )
    told = (await invoke(vmand, "status", "web")).output
    rows = dict(line.split(maxsplit=1) for line in told.partition("\n\n")[0].splitlines()[1:])
    assert set(rows) == {*type(PARTITION).__struct_fields__} - {"last_output"}
    assert (rows["cpus"], rows["memory_bytes"], rows["unit"]) == ("2-3", "536870912 (512 MiB)", "-")
    assert (rows["cores_grade"], rows["state"], rows["strict"]) == ("isolated", "FAILED", "false")
    assert told.endswith("\nits last output:\n  one\n  two\n")
    found = json.loads((await invoke(vmand, "--json", "status", "web")).output)
    assert (found["name"], found["last_output"]) == ("web", "one\ntwo")


async def test_doctor(vmand: FakeVmand) -> None:
    vmand.answers["doctor"] = [
        Check(subject="cores", level="good", found="cores 1-3 can be isolated"),
        Check(subject="vsock", level="missing", found="no /dev/vhost-vsock", cure="modprobe vhost_vsock " + "x " * 60),
    ]
    done = await run(vmand.socket, "doctor")
    assert done.status == 0
    first, cure, last = done.out.splitlines()
    assert first == "missing  vsock  no /dev/vhost-vsock"
    assert cure.startswith("                cure: modprobe vhost_vsock x x")
    assert last == "good     cores  cores 1-3 can be isolated"
    assert json.loads((await run(vmand.socket, "doctor", "--json")).out)[0]["level"] == "good"
    assert "\x1b[31mmissing" in await on_a_terminal(vmand, "doctor")
    assert "\x1b[" not in await on_a_terminal(vmand, "doctor", NO_COLOR="1")


async def on_a_terminal(vmand: FakeVmand, *words: str, **more: str) -> str:
    terminal = Terminal()
    try:
        process = await start(vmand.socket, *words, more=more, stdout=terminal.fd)
        assert (await ended(process)).status == 0
        await terminal.until("isolated")
        return terminal.shown
    finally:
        terminal.close()


async def test_events_are_lines_and_a_guest_writes_none_of_ours(vmand: FakeVmand) -> None:
    process = await start(vmand.socket, "events", "--console")
    as_json = await start(vmand.socket, "events", "--json")
    assert process.stdout is not None
    assert as_json.stdout is not None
    await vmand.asked_for("subscribe", 2)
    assert ("subscribe", {"console": True}) in vmand.asked
    for event in (
        Event(kind="state", partition=2, time_s=1.5, state=State.FAILED, reason="it panicked"),
        Event(
            kind="grade",
            partition=2,
            time_s=2.0,
            cores_grade=CoresGrade.PINNED,
            memory_grade=MemoryGrade.PLAIN,
            reason="cores: somebody took core 3",
        ),
        Event(kind="console", partition=2, time_s=2.5, text="\x1b[2Jone\r\n3 gone\r\n"),
        Event(kind="gone", partition=2, time_s=3.0),
    ):
        for connection in vmand.connections:
            connection.send_event("partition", event)
    try:
        async with asyncio.timeout(60):
            lines = [(await process.stdout.readline()).decode() for _ in range(5)]
            first = json.loads(await as_json.stdout.readline())
        assert lines == [
            "2 state FAILED it panicked\n",
            "2 grade cores pinned, memory plain cores: somebody took core 3\n",
            "2 console  [2Jone\n",
            "2 console 3 gone\n",
            "2 gone\n",
        ]
        assert (first["kind"], first["state"]) == ("state", "FAILED")
    finally:
        for one in (process, as_json):
            with contextlib.suppress(ProcessLookupError):
                one.send_signal(signal.SIGINT)
        done = [await ended(one) for one in (process, as_json)]
    assert [(one.status, one.err) for one in done] == [(130, ""), (130, "")]


async def test_a_shutdown_that_is_interrupted_says_that_it_goes_on(vmand: FakeVmand) -> None:
    vmand.answers["shutdown"] = asyncio.Event()
    process = await start(vmand.socket, "shutdown", "web")
    await vmand.asked_for("shutdown")
    process.send_signal(signal.SIGINT)
    done = await ended(process)
    assert (done.status, done.out, done.err) == (130, "", "vmand goes on with it: vmanctl status web\n")


async def test_progress_is_for_people(vmand: FakeVmand) -> None:
    slow = vmand.answers["shutdown"] = asyncio.Event()
    terminal = Terminal()
    try:
        process = await start(vmand.socket, "shutdown", "2", "--timeout=30", stderr=terminal.fd)
        await terminal.until("shutting down 2 … ")
        await terminal.until(" s of 30 s")
        await terminal.until("shutting down 2 … ")
        slow.set()
        assert (await ended(process)).out == "partition 2: DEPLOYED\n"
        await terminal.until(f"\r{'':79}\r")
        assert terminal.text == ""
    finally:
        terminal.close()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BadStateError("partition 2 is READY; suspend needs DEPLOYED"), 1),
        (FailedError("QEMU says no"), 1),
        (TimedOutError("QEMU did not answer"), 75),
        (DeniedError("suspend needs the role operate"), 77),
    ],
)
async def test_exit_statuses(vmand: FakeVmand, error: Any, status: int) -> None:
    vmand.answers["suspend"] = error
    done = await run(vmand.socket, "suspend", "2")
    assert (done.status, done.out) == (status, "")
    assert done.err.startswith(f"vmanctl: {error.code}: {error.message}")
    assert done.err.count("\n") == 1


async def test_away_and_wrong_usage(vmand: FakeVmand) -> None:
    away = vmand.socket.with_name("nobody.sock")
    done = await run(away, "list")
    assert (done.status, "is the daemon running?" in done.err) == (75, True)
    assert (await run(away, "list", "x")).status == 64
    assert (await run(away, "lisst")).status == 64
    assert (await run(away, "completion", "zsh")).status == 0
    no_text = await run(away, "status", os.fsdecode(b"\xff"))
    assert (no_text.status, no_text.err) == (64, "vmanctl: '\\udcff' is not UTF-8, and what a daemon is told is\n")


async def complete(socket: Path, shell: str, *words: str) -> list[str]:
    """What a shell would be offered for the last word."""
    more = {"_VMANCTL_COMPLETE": f"{shell}_complete", "COMP_WORDS": " ".join(words)}
    more["COMP_CWORD"] = words[-1] if shell == "fish" else str(len(words) - 1)
    done = await run(socket, more=more)
    assert (done.status, done.err) == (0, "")
    return done.out.split("\n")[:-1] if done.out.strip() else []


async def test_completion_knows_the_partitions(vmand: FakeVmand) -> None:
    assert await complete(vmand.socket, "bash", "vmanctl", "status", "") == ["plain,web"]
    assert await complete(vmand.socket, "bash", "vmanctl", "status", "x") == []
    assert await complete(vmand.socket, "bash", "vmanctl", "events", "2") == ["plain,2"]
    assert (await complete(vmand.socket, "zsh", "vmanctl", "status", "w"))[:3] == ["plain", "web", "2 DEPLOYED"]
    assert await complete(vmand.socket, "fish", "vmanctl", "sus") == [
        "plain,suspend\tStop the guest's CPUs; its state is kept."
    ]
    assert "plain,--kernel" in await complete(vmand.socket, "bash", "vmanctl", "deploy", "--k")
    vmand.answers["list"] = DeniedError("no role")
    assert await complete(vmand.socket, "bash", "vmanctl", "status", "") == []
    vmand.answers["list"] = asyncio.Event()
    assert await complete(vmand.socket, "bash", "vmanctl", "status", "") == []
    assert await complete(vmand.socket.with_name("nobody"), "bash", "vmanctl", "status", "") == []


async def test_a_command_loads_what_it_needs(vmand: FakeVmand) -> None:
    code = (
        "import sys; from vmand.cli import main; sys.argv = ['vmanctl', 'status', '2']\n"
        "try: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, env={"VMAND_SOCKET": str(vmand.socket)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    done = await ended(process)
    loaded = {one for one in done.err.split() if one.startswith("vmand")}
    assert loaded == {"vmand", "vmand.cli", "vmand.cli_look", "vmand.cli_options", "vmand.cli_show"}


def test_no_command_loads_the_daemon() -> None:
    code = (
        "import sys, click; from vmand.cli import vmanctl; import vmand.terminal\n"
        "[vmanctl.get_command(click.Context(vmanctl), one) for one in vmanctl.list_commands(click.Context(vmanctl))]\n"
        "print(*(one for one in sys.modules if one.startswith('vmand.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {one for one in done.stdout.split() if not one.startswith("vmand.cli")} == {"vmand.terminal"}
