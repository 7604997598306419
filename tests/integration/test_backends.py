"""One table of commands and one of mistakes, for a vmand with QEMU and for a vmand with a firmware: the same answers.

The firmware is the seccomp double around the whole daemon. Whoever uses the control socket must not have to know which
one is below: the same code, the same text, the same state afterwards.
"""

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from edgehold.api.vmand import Partition, State, VmandClient, wait_for_state
from edgehold.errors import EdgeholdError
from edgehold.testing.capability import guest_image, missing, need_command
from edgehold.testing.daemons import private_directory
from edgehold.testing.partitions import PrivateVmand, destroy_all, private_vmand
from edgehold.testing.vmanager import ROOT, Double
from vmand.model import TABLE

BOOT_S = 60.0
# Nobody reads the power button: QEMU's guest waits for a root file system, the firmware's is told to be deaf.
DEAF = "quiet no_timer_check rootwait root=/dev/none panic=-1 vman.deaf"
COMMANDS = sorted(TABLE.table)
STATES = [State.READY, State.DEPLOYED, State.SUSPENDED, State.FAILED]


class UnderDouble(PrivateVmand):
    """A vmand whose firmware is the double; it ends with it."""

    double: Double

    def command(self) -> list[str]:
        return self.double.command([sys.executable, "-m", "vmand", "--config", str(self.config)], cpus=(1,))

    def spawn(self, *, notify: str = "") -> None:
        environment = {**os.environ, **({"NOTIFY_SOCKET": notify} if notify else {})}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )


@contextlib.asynccontextmanager
async def firmware_vmand() -> AsyncIterator[PrivateVmand]:
    with private_directory("eh-vm-") as directory:
        (directory / "double").mkdir()
        double = Double.build(directory / "double")
        settings = {"backend": "vmanager", "vmanager_device": str(double.device.path), "pool": {"cores": "1"}}
        vmand = UnderDouble(directory, settings=settings)
        vmand.double = double
        try:
            await vmand.start()
            yield vmand
            await destroy_all(vmand)
        finally:
            await vmand.stop()
            shutil.rmtree(vmand.memory, ignore_errors=True)


class Side:
    """One of the two daemons, and how a guest is made to end there."""

    def __init__(self, name: str, vmand: PrivateVmand, client: VmandClient) -> None:
        self.name = name
        self.vmand = vmand
        self.client = client
        self.kernel, self.initrd = guest_image(ROOT)

    async def call(self, command: str, **args: Any) -> Any:
        return await self.client._control.call(command, args, timeout_s=BOOT_S)

    async def answer(self, command: str, **args: Any) -> tuple[str, str]:
        """(code, text) of a refusal; code ``done`` and the state afterwards."""
        try:
            said = await self.call(command, **args)
        except EdgeholdError as error:
            return error.code, error.message
        return "done", str(said.get("state", "")) if isinstance(said, dict) else ""

    async def create(self, **args: Any) -> int:
        return int((await self.call("create-partition", **{"cores": 1, "memsize": 0.125, **args}))["id"])

    def deploy(self, one: int, **args: Any) -> Awaitable[Any]:
        return self.call("deploy", partition_id=one, kernel=str(self.kernel), cmdline=DEAF, **args)

    async def make(self, state: State) -> int:
        one = await self.create()
        if state is State.READY:
            return one
        if state is State.FAILED and self.name == "firmware":
            await self.call("deploy", partition_id=one, kernel=str(self.kernel), cmdline="vman.crash=1")
        else:
            await self.deploy(one)
        if state is State.SUSPENDED:
            await self.call("suspend", id=one)
        elif state is State.FAILED and self.name == "qemu":
            pid = (await self.client.status(one)).pid
            assert pid in self.vmand.guests()
            os.kill(pid, signal.SIGKILL)
        await self.reaches(one, state)
        return one

    async def reaches(self, one: int, state: State) -> Partition:
        return await wait_for_state(self.client, one, state, timeout_s=BOOT_S)

    def arguments(self, command: str, one: int) -> dict[str, Any]:
        if command == "deploy":
            return {"partition_id": one, "kernel": str(self.kernel), "cmdline": DEAF}
        return {"id": one, **({"timeout_s": 0.1} if command == "shutdown" else {})}

    async def state(self, one: int) -> str:
        """As callers see it; ``gone`` where there is none."""
        return {each.id: each.state.value for each in await self.client.list_partitions()}.get(one, "gone")


@pytest.fixture
async def sides() -> AsyncIterator[tuple[Side, Side]]:
    need_command("qemu-system-x86_64", "qemu-system-x86")
    guest_image(ROOT)
    if 1 not in os.sched_getaffinity(0):
        missing("needs a core 1 for a dedicated partition")
    settings = {"accelerator": "tcg", "backend": "qemu", "pool": {"cores": "1"}}
    async with (
        private_vmand(settings=settings) as qemu,
        firmware_vmand() as firmware,
        await qemu.client() as of_qemu,
        await firmware.client() as of_firmware,
    ):
        yield Side("qemu", qemu, of_qemu), Side("firmware", firmware, of_firmware)
        for one in (qemu, firmware):
            assert one.running, one.log_text()[-3000:]
        assert "Traceback" not in firmware.log_text(), firmware.log_text()


async def both(sides: Sequence[Side], work: Callable[[Side], Awaitable[Any]]) -> Any:
    """The same at both; what both said."""
    qemu, firmware = await asyncio.gather(*(work(side) for side in sides))
    assert qemu == firmware
    return qemu


@pytest.mark.slow
async def test_every_command_in_every_state(sides: tuple[Side, Side]) -> None:
    for state in STATES:
        for command in COMMANDS:

            async def case(side: Side, state: State = state, command: str = command) -> tuple[Any, str]:
                one = await side.make(state)
                said = await side.answer(command, **side.arguments(command, one))
                after = await side.state(one)
                if after != "gone":
                    await side.answer("shutdown", id=one, force=True)
                    await side.call("destroy-partition", id=one)
                return said, after

            (code, text), after = await both(sides, case)
            target = TABLE.table[command][1]
            if TABLE.allows(command, state):
                assert (code, after) == ("done", target.value if target else "gone"), (state, command, text)
            else:
                assert (code, after) == ("bad-state", state.value), (state, command, text)
                assert re.match(rf"partition \d+ is {state.value}; {command} needs ", text)


async def test_every_command_while_another_is_under_way(sides: tuple[Side, Side]) -> None:
    """BUSY: a shutdown waits for a guest that ignores it."""

    async def case(side: Side) -> list[tuple[str, str]]:
        one = await side.make(State.DEPLOYED)
        waits = asyncio.create_task(side.answer("shutdown", id=one, timeout_s=BOOT_S))
        assert (await side.reaches(one, State.BUSY)).command == "shutdown"
        answers = await asyncio.gather(*(side.answer(each, **side.arguments(each, one)) for each in COMMANDS))
        assert await side.state(one) == "BUSY"
        answers.append(await side.answer("shutdown", id=one, force=True))
        answers.append(await waits)
        return answers

    *refused, forced, waited = await both(sides, case)
    for command, answer in zip(COMMANDS, refused, strict=True):
        text = f"partition 1 is BUSY: shutdown is under way; {command} can be tried again"
        assert answer == ("bad-state", text)
    assert forced == waited == ("done", "READY")


async def test_a_shutdown_that_leaves(sides: tuple[Side, Side]) -> None:
    """A guest that ignores it is afterwards as it was."""

    async def case(side: Side) -> list[Any]:
        seen: list[Any] = []
        for state in (State.DEPLOYED, State.SUSPENDED):
            one = await side.make(state)
            seen.append(await side.answer("shutdown", id=one, timeout_s=0.1, leave=True))
            seen.append(await side.state(one))
            seen.append(await side.answer("shutdown", id=one, leave=True, force=True))
            seen.append(await side.answer("suspend" if state is State.DEPLOYED else "restore", id=one))
            seen.append(await side.answer("shutdown", id=one, force=True))
            await side.call("destroy-partition", id=one)
        return seen

    running, suspended = (told := await both(sides, case))[:5], told[5:]
    assert running[0] == ("timeout", "shutdown: the guest did not power off within 0.1 s; it goes on, and is DEPLOYED")
    assert suspended[0] == (running[0][0], running[0][1].replace("DEPLOYED", "SUSPENDED"))
    assert (running[1], running[3:]) == ("DEPLOYED", [("done", "SUSPENDED"), ("done", "READY")])
    assert (suspended[1], suspended[3:]) == ("SUSPENDED", [("done", "DEPLOYED"), ("done", "READY")])
    assert running[2] == suspended[2]
    assert running[2][0] == "bad-request"


async def test_changes_and_annotations(sides: tuple[Side, Side]) -> None:
    uuid = "5f0f2f5c-8a51-4f0e-9e5e-0d8f5a0c7b11"

    async def case(side: Side) -> list[Any]:
        one = await side.create(name="a", uuid=uuid, annotations={"k": "1"})
        seen: list[Any] = [
            await side.answer("change-partition", id=one, **args)
            for args in (
                {"name": "b", "annotations": {"k": None, "l": "2"}},
                {"memsize": 0.25},
                {"memsize": 64_000},
                {"cores": 2},
                {"secure": True},
                {"memsize": 0.5, "cores": 1, "name": "c"},
            )
        ]
        seen[2] = (seen[2][0], re.sub(r"\d+ MiB are left", "", seen[2][1]))
        await side.vmand.kill()
        await side.vmand.start()
        async with await side.vmand.client() as side.client:
            # The double ends with its vmand, as a firmware does with the host; QEMU's memory is still there.
            assert ("taking it anew" in side.vmand.log_text()) == (side.name == "firmware")
            status = await side.client.status("c")
            await side.deploy(one)
            seen += [status.id, status.uuid, status.memory_bytes, status.cores, status.reason]
            seen += [await side.client.annotations(one), await side.answer("change-partition", id=one, name="d")]
            seen += [await side.answer("annotate", id=one, annotations={"l": "3"}), await side.state(one)]
        return seen

    seen = await both(sides, case)
    codes = ["done", "done", "no-capacity", "no-capacity", "unsupported", "done"]
    assert [one[0] for one in seen[:6]] == codes
    assert seen[6:11] == [1, uuid, 512 << 20, 1, ""]
    assert seen[11:] == [
        {"l": "2"},
        ("bad-state", "partition 1 is DEPLOYED; change-partition needs READY (shutdown leads there)"),
        ("done", ""),
        "DEPLOYED",
    ]


async def test_mistakes(sides: tuple[Side, Side], tmp_path: Path) -> None:
    for name, content in {"none": b"nothing", "cpio": b"070701" * 900, "tree": b"\xd0\x0d\xfe\xed" * 900}.items():
        (tmp_path / name).write_bytes(content)
    one = [await side.create(name="first") for side in sides]
    assert one == [1, 1]
    kernel = str(sides[0].kernel)
    at = {"partition_id": 1, "kernel": kernel}
    missing_file = str(tmp_path / "missing")
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        ("create-partition", {"cores": 4095, "memsize": 1}, "bad-request", "cores: 4095 are wanted and this host has"),
        ("create-partition", {"cores": 1, "memsize": 0.001}, "bad-request", "memsize: 0.001 GiB is less than 16 MiB"),
        ("create-partition", {"cores": 1, "memsize": 70000}, "bad-request", "memsize: 70000 GiB is more than"),
        ("create-partition", {"cores": 1, "memsize": 0.1}, "no-capacity", "cores: 1 is wanted .* and none is left"),
        ("create-partition", {"cores": 1, "memsize": 0.1, "secure": True}, "unsupported", "secure: not supported on"),
        ("create-partition", {"cores": 1, "memsize": 0.1, "name": "a/b"}, "bad-request", "name: 'a/b' is not 1 to 32"),
        ("create-partition", {"cores": 1, "memsize": 0.1, "name": "first"}, "bad-request", "name: 'first' is taken"),
        ("create-partition", {"cores": 1, "memsize": 0.1, "mode": "x"}, "bad-request", "mode: Invalid enum value 'x'"),
        ("deploy", {"partition_id": 77, "kernel": kernel}, "not-found", "there is no partition 77"),
        ("deploy", {**at, "kernel": missing_file}, "bad-request", "kernel: .*missing: No such file"),
        ("deploy", {**at, "kernel": str(tmp_path / "none")}, "bad-request", "kernel: .* looks like nothing known"),
        ("deploy", {**at, "kernel": str(tmp_path / "cpio")}, "bad-request", "looks like an initial RAM disk"),
        ("deploy", {**at, "kernel": "relative"}, "bad-request", "kernel: .*absolute"),
        ("deploy", {**at, "initrd": missing_file}, "bad-request", "initrd: .*missing: No such file"),
        ("deploy", {**at, "dtb": str(tmp_path / "tree")}, "unsupported", "dtb: an x86 guest takes no device tree"),
        ("deploy", {**at, "cmdline": "a\nb"}, "bad-request", "cmdline: control characters are not allowed"),
        ("deploy", {**at, "cmdline": "a" * 2049}, "bad-request", "cmdline: longer than 2048 bytes"),
        ("deploy", {**at, "kernel": 0}, "bad-request", "kernel: there is no descriptor 0: none came"),
        ("deploy", {**at, "colour": 1}, "bad-request", "unknown field colour"),
        ("create-partition", {"cores": 1, "memsize": 1, "uuid": "A"}, "bad-request", "uuid: 'A' is none as RFC 9562"),
        ("change-partition", {"id": 1, "name": "a/b"}, "bad-request", "name: 'a/b' is not 1 to 32"),
        ("change-partition", {"id": 1, "mode": "x"}, "bad-request", "mode: Invalid enum value 'x'"),
        ("change-partition", {"id": 1, "cores": 4095}, "bad-request", "cores: 4095 are wanted and this host has"),
        ("annotate", {"id": 1, "annotations": {"A": "x"}}, "bad-request", "annotations: the key 'A' is not 1 to 64"),
        ("annotate", {"id": 1, "annotations": {"a": 1}}, "bad-request", "annotations.*: Expected str"),
        ("annotations", {"id": 77}, "not-found", "there is no partition 77"),
        ("shutdown", {"id": 1, "timeout_s": -1}, "bad-request", "timeout_s: Expected float >= 0"),
        ("status", {"id": "nobody"}, "not-found", "there is no partition 'nobody'"),
        ("attach-console", {"id": "nobody"}, "not-found", "there is no partition 'nobody'"),
        ("explode", {}, "bad-request", "unknown command 'explode'; known: annotate, "),
    ]
    for command, args, code, text in cases:

        async def case(side: Side, command: str = command, args: dict[str, Any] = args) -> tuple[str, str]:
            return await side.answer(command, **args)

        said = await both(sides, case)
        assert said[0] == code, (command, args, said)
        assert re.search(text, said[1]), (command, args, said)

    async def rest(side: Side) -> list[tuple[int, str]]:
        return [(each.id, each.state.value) for each in await side.client.list_partitions()]

    assert await both(sides, rest) == [(1, "READY")]


async def test_descriptors(sides: tuple[Side, Side]) -> None:
    """Images as open files, also without a name; and those that can't be images."""
    with socket.socket(socket.AF_UNIX) as no_file, sides[0].kernel.open("rb") as kernel:

        async def case(side: Side) -> list[tuple[str, str]]:
            one = await side.create()
            answers = []
            for fd in (no_file.fileno(), kernel.fileno()):
                try:
                    await side.client.deploy(one, kernel=fd, cmdline=DEAF)
                    answers.append(("done", await side.state(one)))
                except EdgeholdError as error:
                    answers.append((error.code, error.message))
            return answers

        bad, good = await both(sides, case)
    assert bad[0] == "bad-request"
    assert "not a regular file" in bad[1]
    assert good == ("done", "DEPLOYED")


async def test_what_differs_is_said(sides: tuple[Side, Side]) -> None:
    """Traits, grades, accelerators: told by ``capabilities`` and ``status``, in the same fields."""
    qemu, firmware = sides
    told = await firmware.client.capabilities()
    assert (told.backend, told.cores_pool, told.cores_grade.value) == ("vmanager", (1,), "isolated")
    assert told.supports == ("device-tree", "exit-events", "shutdown", "suspend")
    one = await firmware.make(State.DEPLOYED)
    status = await firmware.client.status(one)
    assert (status.cores_grade, status.memory_grade) == ("isolated", "locked")
    assert (status.accelerator, status.pid, status.cpus) == ("firmware", None, (1,))
    for command, args, text in (
        (
            "create-partition",
            {"cores": 1, "memsize": 0.1, "mode": "shared"},
            "gives partitions cores of their own only",
        ),
        ("console", {"id": one}, "no console of a guest"),
        ("attach-console", {"id": one}, "no console of a guest"),
    ):
        code, said = await firmware.answer(command, **args)
        assert code == "unsupported"
        assert text in said
    await firmware.call("shutdown", id=one, force=True)
    code, said = await firmware.answer("deploy", partition_id=one, kernel=str(firmware.kernel), paused=True)
    assert (code, "begin as soon as they are loaded" in said) == ("unsupported", True)
    assert "paused" in (await qemu.client.capabilities()).supports
    code, said = await firmware.answer("deploy", partition_id=one, kernel=str(firmware.kernel), vsock=True)
    assert (code, "no virtio devices" in said) == ("unsupported", True)
