"""vmand with real guests under emulation: a whole life, guests that end by themselves, refusals, the command line."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgehold.api.vmand import Mode, State, VmandClient, wait_for_state
from edgehold.errors import (
    BadRequestError,
    BadStateError,
    EdgeholdError,
    FailedError,
    NoCapacityError,
    NotFoundError,
    TimedOutError,
    UnavailableError,
    UnsupportedError,
)
from edgehold.testing.capability import missing, need_command, need_root
from edgehold.testing.load import eventually as eventually_true
from edgehold.testing.partitions import PrivateVmand, private_vmand

ROOT = Path(__file__).parents[2]
BOOT_S = 60.0
CMDLINE = "quiet no_timer_check tsc=reliable panic=-1"
JOB = f"{CMDLINE} edgehold.job_ms=1 edgehold.period_ms=50"
UP = "edgehold-guest up"
VMANCTL = str(Path(sys.executable).with_name("vmanctl"))


class Watch:
    """The console of one partition, waited on by its lines."""

    def __init__(self, client: VmandClient, partition: int, text: str) -> None:
        self._client = client
        self._partition = partition
        self.text = text

    @classmethod
    async def open(cls, vmand: PrivateVmand, partition: int) -> "Watch":
        client = await vmand.client()
        return cls(client, partition, await client.subscribe(partition, console=True))

    async def until(self, condition: Callable[[str], Any], *, timeout_s: float = BOOT_S) -> Any:
        """Until the condition holds for everything that was printed since the last call that held."""
        try:
            async with asyncio.timeout(timeout_s):
                if found := condition(self.text):
                    self.text = ""
                    return found
                async for event in self._client.events():
                    self.text += event.text
                    if found := condition(self.text):
                        self.text = ""
                        return found
        except TimeoutError:
            pytest.fail(f"not printed within {timeout_s:g} s; the console's end:\n{self.text[-2000:]}")

    async def up(self) -> None:
        """Until the guest has booted and reads its power button."""
        await self.until(lambda text: UP in text)

    async def jobs(self, *, timeout_s: float = BOOT_S) -> int:
        """Until the guest prints a job; its number."""
        found = await self.until(lambda text: re.findall(r"edgehold-job n=(\d+) ", text), timeout_s=timeout_s)
        return int(found[-1])

    async def close(self) -> None:
        await self._client.close()


@contextlib.asynccontextmanager
async def deployed(
    vmand: PrivateVmand, image: tuple[Path, Path], *, cmdline: str = CMDLINE, **options: Any
) -> AsyncIterator[tuple[int, Watch]]:
    """A partition with a guest, and its console."""
    async with await vmand.client() as client:
        given = {"cores": 1, "memsize_gb": 0.125, "mode": Mode.SHARED, **options}
        one = await client.create_partition(**given)
        watch = await Watch.open(vmand, one)
        try:
            await client.deploy(one, kernel=image[0], initrd=image[1], cmdline=cmdline)
            yield one, watch
        finally:
            await watch.close()


async def test_a_whole_life(vmand: PrivateVmand, client: VmandClient, image: tuple[Path, Path]) -> None:
    async with deployed(vmand, image, cmdline=JOB, name="first") as (one, watch):
        status = await client.status(one)
        assert (status.state, status.name, status.accelerator, status.boot_count) == (State.DEPLOYED, "first", "tcg", 1)
        assert status.pid in vmand.guests()
        memory = vmand.memory / f"{status.uuid}.mem"
        assert memory.stat().st_size == status.memory_bytes == 128 << 20
        assert memory.stat().st_blocks * 512 == status.memory_bytes  # all of it is there, not promised
        assert memory.stat().st_mode & 0o777 == 0o600
        (vcpu,) = await client.vcpus(one)
        assert vcpu.tid in threads(status.pid)
        assert os.sched_getaffinity(vcpu.tid) == os.sched_getaffinity(0)
        await watch.up()
        first = await watch.jobs()

        await client.suspend(one)
        assert (await client.status(one)).state is State.SUSPENDED
        await asyncio.to_thread(_stands_still, vcpu.tid)
        await client.restore(one)
        assert await watch.jobs() > first

        await client.reboot(one)
        await watch.up()
        assert (await client.status(one)).boot_count == 2

        await client.shutdown(one)
        assert "power-off" in await client.console(one)
        status = await client.status(one)
        assert (status.state, status.reason, status.pid) == (State.READY, "", None)
        assert vmand.guests() == []
        assert memory.exists()

        await client.deploy(one, kernel=image[0], initrd=image[1], cmdline=CMDLINE)
        await watch.up()
        await client.shutdown(one, force=True)
        await client.destroy_partition(one)
        assert vmand.remains() == []
        with pytest.raises(NotFoundError):
            await client.status(one)


def threads(pid: int | None) -> set[int]:
    """The threads of a process."""
    return {int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()}


def _stands_still(tid: int) -> None:
    """The thread uses no CPU over 0.3 s, soon after it was stopped."""
    import time

    def used() -> int:
        return int(Path(f"/proc/{tid}/schedstat").read_text().split()[0])

    def still() -> bool:
        before = used()
        time.sleep(0.3)
        return used() - before < 1_000_000

    eventually_true(still, timeout_s=20, what="the vCPU stands still")


async def test_the_command_line_in_both_spellings(vmand: PrivateVmand, image: tuple[Path, Path]) -> None:
    async def vmanctl(*words: object, status: int = 0) -> str:
        process = await asyncio.create_subprocess_exec(
            VMANCTL,
            *map(str, words),
            env={**os.environ, "VMAND_SOCKET": str(vmand.socket)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        out, err = await process.communicate()
        assert process.returncode == status, (words, out, err)
        return (out if status == 0 else err).decode().strip()

    kernel, initrd = image
    one = await vmanctl("create-partition", "-cores", 1, "-memsize", 0.125, "-secure", "false", "-mode", "shared")
    two = await vmanctl("create-partition", "--cores", 1, "--memsize", 0.125, "--secure=false", "--mode=shared")
    assert await vmanctl("deploy", "-kernel", kernel, "-initrd", initrd, "-cmdline", CMDLINE, one)
    said = await vmanctl("deploy", "--kernel", kernel, f"--initrd={initrd}", "--cmdline", CMDLINE, two)
    assert said == f"partition {two}: DEPLOYED"
    follow = await asyncio.create_subprocess_exec(
        VMANCTL, "--socket", str(vmand.socket), "console", one, "--follow", stdout=subprocess.PIPE
    )
    assert follow.stdout is not None
    async with asyncio.timeout(BOOT_S):
        while UP.encode() not in await follow.stdout.readline():
            pass
    assert UP in await vmanctl("console", "--tail", one)
    assert "DEPLOYED" in await vmanctl("suspend", one) or (await vmanctl("status", one)).count("SUSPENDED")
    assert (await vmanctl("status", f"p{one}")).splitlines()[1].split() == ["id", one]  # by its name
    assert "no partition 'nobody'" in await vmanctl("status", "nobody", status=1)
    assert "134217728 (128 MiB)" in await vmanctl("status", one)
    assert " 0.12 " in await vmanctl("list")
    listed = json.loads(await vmanctl("--json", "list"))
    assert [(row["id"], row["state"]) for row in listed] == [(int(one), "SUSPENDED"), (int(two), "DEPLOYED")]
    assert "bad-state: partition 1 is SUSPENDED; reboot needs DEPLOYED" in await vmanctl("reboot", one, status=1)
    assert await vmanctl("restore", one)
    assert await vmanctl("reboot", two)
    assert (await vmanctl("vcpus", one)).splitlines()[1].split()[0] == "0"
    assert "KVM" in await vmanctl("capabilities") or "tcg" in await vmanctl("capabilities")
    assert "ended by force" in await vmanctl("shutdown", "-timeout", 0, two)
    assert "READY" in await vmanctl("shutdown", one)
    assert "gone" in await vmanctl("destroy-partition", one)
    async with asyncio.timeout(20):
        await follow.communicate()  # it ends when its partition is gone
    assert follow.returncode == 0
    await vmanctl("destroy-partition", two)
    assert "not-found" in await vmanctl("status", two, status=1)
    await vmanctl("create-partition", "-cores", "x", "-memsize", 1, status=64)
    await vmanctl("create-partition", "-cores", 1, "-memsize", 1, "-secure", "true", status=1)
    assert "complete" in await vmanctl("completion", "bash")
    assert vmand.remains() == []


async def test_a_guest_that_went_off_while_vmand_was_away_is_ready(
    vmand: PrivateVmand, image: tuple[Path, Path]
) -> None:
    async with deployed(vmand, image) as (one, watch):
        await watch.up()
        from qemu.qmp import QMPClient

        await vmand.kill()
        qmp = QMPClient("test")
        await qmp.connect(str(vmand.runtime / "p" / str(one) / "qmp.sock"))
        await qmp.execute("system_powerdown")
        async with asyncio.timeout(BOOT_S):
            while (await qmp.execute("query-status"))["status"] != "shutdown":  # type: ignore[index]  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await qmp.disconnect()
    await vmand.start()
    async with await vmand.client() as again:
        status = await wait_for_state(again, one, State.READY, timeout_s=10)
        assert "powered itself off" in status.reason
    assert vmand.guests() == []


async def test_qemus_death_is_noticed_and_can_be_repaired(
    vmand: PrivateVmand, client: VmandClient, image: tuple[Path, Path]
) -> None:
    async with deployed(vmand, image) as (one, watch):
        await watch.up()
        pid = (await client.status(one)).pid
        assert pid in vmand.guests()
        loop = asyncio.get_running_loop()
        os.kill(pid, signal.SIGKILL)
        killed = loop.time()
        status = await wait_for_state(client, one, State.FAILED, timeout_s=10)
        assert loop.time() - killed < 5
        assert "SIGKILL" in status.reason
        assert UP in await client.console(one)  # its last words are kept
        with pytest.raises(BadStateError, match="FAILED"):
            await client.deploy(one, kernel=image[0])
        await client.shutdown(one)
        await client.deploy(one, kernel=image[0], initrd=image[1], cmdline=CMDLINE)
        await watch.up()
        await client.shutdown(one)
        await client.destroy_partition(one)
    assert vmand.remains() == []


async def test_a_panic_is_a_failure(vmand: PrivateVmand, client: VmandClient, image: tuple[Path, Path]) -> None:
    async with deployed(vmand, image, cmdline=f"{CMDLINE.replace('panic=-1', 'panic=0')} edgehold.panic_s=0.2") as (
        one,
        _watch,
    ):
        status = await wait_for_state(client, one, State.FAILED, timeout_s=BOOT_S)
        assert "panicked" in status.reason
        assert "Kernel panic" in await client.console(one)
        assert vmand.guests() == []
        await client.destroy_partition(one)


async def test_a_hung_qemu_times_out_and_nothing_else_waits(image: tuple[Path, Path]) -> None:
    async with private_vmand(settings={"accelerator": "tcg", "qmp_timeout_s": 3}) as vmand:
        async with deployed(vmand, image) as (one, watch), await vmand.client() as client:
            await watch.up()
            pid = (await client.status(one)).pid
            assert pid is not None
            assert vmand.guests() == [pid]
            with stopped(pid):
                hung = asyncio.create_task(client.suspend(one))
                assert (await client.status(one)).state in {State.DEPLOYED, State.BUSY}
                with pytest.raises(TimedOutError, match="did not answer to stop"):
                    await hung
                assert (await client.status(one)).state is State.DEPLOYED
            # The late `stop` takes effect all the same: what QEMU does is what vmand says.
            await wait_for_state(client, one, State.SUSPENDED, timeout_s=20)
            await client.restore(one)
            with stopped(pid):  # a restart finds it hanging, leaves it alive, and serves
                await vmand.kill()
                await vmand.start()
                assert vmand.guests() == [pid]
        async with await vmand.client() as client:
            assert (await client.status(one)).state is State.DEPLOYED
            await eventually(client.suspend, one)
            await client.restore(one)
            with stopped(pid):
                await client.shutdown(one, timeout_s=0.1)
                assert vmand.guests() == []


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that hangs."""
    fd = os.pidfd_open(pid)
    try:
        signal.pidfd_send_signal(fd, signal.SIGSTOP)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(fd, signal.SIGCONT)
        os.close(fd)


async def eventually(command: Callable[[int], Awaitable[None]], one: int) -> None:
    """Until the command does not time out any more."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await command(one)
            except TimedOutError:
                continue


async def test_a_dedicated_partition_is_pinned(image: tuple[Path, Path]) -> None:
    cores = sorted(os.sched_getaffinity(0) - {0})
    if not cores:
        missing("needs two cores")
    async with (
        private_vmand(settings={"accelerator": "tcg", "pool": {"cores": f"0,{cores[-1]}"}}) as vmand,
        deployed(vmand, image, mode=Mode.DEDICATED) as (one, watch),
        await vmand.client() as client,
    ):
        status = await client.status(one)
        assert status.cpus == (cores[-1],)
        (vcpu,) = await client.vcpus(one)
        assert os.sched_getaffinity(vcpu.tid) == {cores[-1]}
        for tid in threads(status.pid) - {vcpu.tid}:
            assert cores[-1] not in os.sched_getaffinity(tid)
        with pytest.raises(NoCapacityError, match="none is left"):
            await client.create_partition(cores=1, memsize_gb=0.1)
        assert (await client.capabilities()).cores_free == ()
        await watch.up()


async def test_refusals_name_the_cure(
    client: VmandClient, vmand: PrivateVmand, image: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="secure world"):
        await client.create_partition(cores=1, memsize_gb=0.1, secure=True, mode=Mode.SHARED)
    with pytest.raises(NoCapacityError, match="MiB are left"):
        await client.create_partition(cores=1, memsize_gb=60000, mode=Mode.SHARED)
    with pytest.raises(BadRequestError, match="cores"):
        await client.create_partition(cores=4096, memsize_gb=0.1, mode=Mode.SHARED)
    with pytest.raises(BadRequestError, match="name"):
        await client.create_partition(cores=1, memsize_gb=0.1, mode=Mode.SHARED, name="a/b")
    one = await client.create_partition(cores=1, memsize_gb=0.1, mode=Mode.SHARED)
    with pytest.raises(BadRequestError, match=r"kernel: .*No such file"):
        await client.deploy(one, kernel=tmp_path / "none")
    bad = tmp_path / "kernel"
    bad.write_bytes(b"MZ" * 4096)
    with pytest.raises(BadRequestError, match=r"kernel: .* a 64-bit Linux kernel is needed"):
        await client.deploy(one, kernel=bad)
    bad.write_bytes(image[0].read_bytes()[:1024])  # its header says that more follows
    with pytest.raises(FailedError, match="QEMU did not start"):
        await client.deploy(one, kernel=bad)
    assert (await client.status(one)).state is State.READY
    call = client._control.call
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("create-partition", {"cores": "2", "memsize": 1}, "create-partition: cores: Expected int, got str"),
        ("create-partition", {"cores": 1}, "required field memsize"),
        ("create-partition", {"cores": 0, "memsize": 1}, "cores: Expected int >= 1"),
        ("create-partition", {"cores": 1, "memsize": 1, "colour": 1}, "unknown field colour"),
        ("create-partition", {"cores": 1, "memsize": 1, "mode": "x"}, "mode: Invalid enum value 'x'"),
        ("deploy", {"id": one, "kernel": "/k"}, "unknown field id"),
        ("status", {"id": -1}, "id: Expected int >= 1"),
        ("list", {"id": 1}, "it takes no arguments"),
        ("explode", {}, "unknown command 'explode'; known: annotate, annotations, attach-console, "),
    ]
    for command, args, text in cases:
        with pytest.raises(BadRequestError, match=re.escape(text)):
            await call(command, args)
    assert "kernel: " not in vmand.log_text()  # a caller's mistakes are the caller's to read


@contextlib.contextmanager
def tmpfs(path: Path, size: str) -> Iterator[Path]:
    """A small file system of its own."""
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], check=False).returncode:
        missing("can't mount a tmpfs here")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


async def test_memory_runs_out_with_what_is_left() -> None:
    async with private_vmand(settings={"pool": {"memory_gib": 0.125}}) as vmand, await vmand.client() as client:
        first = await client.create_partition(cores=1, memsize_gb=0.1, mode=Mode.SHARED)
        with pytest.raises(NoCapacityError, match="104 MiB are wanted and 24 MiB are left"):
            await client.create_partition(cores=1, memsize_gb=0.1, mode=Mode.SHARED)
        assert len([one for one in vmand.remains() if one.endswith(".mem")]) == 1
        await client.destroy_partition(first)
        assert vmand.remains() == []


async def test_a_small_tmpfs_is_full_and_nothing_stays_behind(tmp_path: Path) -> None:
    need_root()
    with tmpfs(tmp_path / "memory", "64m") as mount:
        async with private_vmand(settings={"memory_dir": str(mount / "m")}) as vmand, await vmand.client() as client:
            with pytest.raises(NoCapacityError, match=r"66 MiB are wanted and 6[0-4] MiB are left"):
                await client.create_partition(cores=1, memsize_gb=0.0635, mode=Mode.SHARED)
            one = await client.create_partition(cores=1, memsize_gb=0.05, mode=Mode.SHARED)
            with pytest.raises(NoCapacityError):
                await client.create_partition(cores=1, memsize_gb=0.05, mode=Mode.SHARED)
            await client.destroy_partition(one)
            assert [entry.name for entry in (mount / "m").iterdir()] == [".lock"]


async def test_a_full_disk_refuses_and_recovers(image: tuple[Path, Path], tmp_path: Path) -> None:
    need_root()
    with tmpfs(tmp_path / "state", "256k") as mount:
        async with private_vmand(settings={"accelerator": "tcg", "state_dir": str(mount / "s")}) as vmand:
            async with deployed(vmand, image) as (one, watch), await vmand.client() as client:
                await watch.up()
                filler = mount / "filler"
                with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                    while True:
                        file.write(b"\0" * 4096)
                # sqlite may still have room in its log for some commands; then it has none, and says so.
                error: EdgeholdError | None = None
                for _ in range(500):
                    before = (await client.status(one)).state
                    try:
                        await (client.suspend(one) if before is State.DEPLOYED else client.restore(one))
                    except EdgeholdError as caught:
                        error = caught
                        break
                assert isinstance(error, FailedError)
                assert "full" in error.message
                assert (await client.status(one)).state is before
                filler.unlink()
                if before is State.SUSPENDED:
                    await client.restore(one)
                await client.shutdown(one)
                await client.destroy_partition(one)
            assert vmand.remains() == []


async def test_health_and_metrics_are_loaded_when_asked_for(vmand: PrivateVmand, client: VmandClient) -> None:
    async def get(path: str) -> str:
        reader, writer = await asyncio.open_unix_connection(str(vmand.runtime / "http.sock"))
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        text = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
        return text

    one = await client.create_partition(cores=1, memsize_gb=0.0625, mode=Mode.SHARED)
    at_rest = vmand.rss_kib()
    assert at_rest <= 45 * 1024
    assert "200 OK" in await get("/healthz")
    text = await get("/metrics")
    assert 'vmand_partitions{state="READY"} 1.0' in text
    assert f"vmand_memory_reserved_bytes {float(64 << 20)!r}" in text or "6.7108864e+07" in text
    assert 'vmand_commands_total{command="create-partition",outcome="done"} 1.0' in text
    with pytest.raises(BadStateError):
        await client.suspend(one)
    assert 'vmand_commands_total{command="suspend",outcome="bad-state"} 1.0' in await get("/metrics")
    assert vmand.rss_kib() <= 50 * 1024


async def test_a_stop_leaves_no_socket_and_says_so(vmand: PrivateVmand) -> None:
    assert vmand.socket.is_socket()
    assert (vmand.runtime / "http.sock").is_socket()
    await vmand.stop()
    assert not list(vmand.runtime.glob("*.sock"))
    await vmand.start()


@pytest.mark.parametrize(("word", "status", "said"), [("--check-config", 0, "right"), ("--x", 64, ""), ("x", 64, "")])
async def test_the_daemons_own_command_line(tmp_path: Path, word: str, status: int, said: str) -> None:
    one = PrivateVmand(tmp_path)
    one._arguments.append(word)
    one.spawn()
    assert await one.wait(timeout_s=20) == status
    assert said in one.log_text()
    await one.kill()


async def test_a_memory_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    """Whoever made it first in /dev/shm, where anybody may, would own the guests' memory."""
    need_root()
    one = PrivateVmand(tmp_path)
    try:
        one.memory.mkdir(mode=0o777)
        one.memory.chmod(0o777)
        with pytest.raises(FailedError, match="others may write to it"):
            await one.start()
        await one.kill()
        os.chown(one.memory, 65534, 65534)
        with pytest.raises(FailedError, match="belongs to uid 65534"):
            await one.start()
        await one.kill()
        os.chown(one.memory, 0, 0)
        one.memory.chmod(0o700)
        victim = tmp_path / "victim"
        (one.memory / ".lock").symlink_to(victim)
        with pytest.raises(FailedError):
            await one.start()
        assert "victim" not in os.listdir(tmp_path)  # noqa: PTH208 - names are enough
    finally:
        await one.kill()
        shutil.rmtree(one.memory)


async def test_a_hung_qemu_does_not_delay_the_start(image: tuple[Path, Path]) -> None:
    """Nor is what it does afterwards lost: the guest powers itself off while vmand can't be told."""
    async with private_vmand(settings={"accelerator": "tcg", "qmp_timeout_s": 60}) as vmand:
        async with deployed(vmand, image) as (one, watch), await vmand.client() as client:
            await watch.up()
            pid = (await client.status(one)).pid
            assert pid is not None
            await vmand.kill()
        with stopped(pid):
            loop = asyncio.get_running_loop()
            begin = loop.time()
            await vmand.start()
            assert loop.time() - begin < 15
            async with await vmand.client() as client:
                status = await client.status(one)
                assert (status.state, status.pid) == (State.DEPLOYED, pid)
                assert "at vmand's start: QEMU" in status.reason
        async with await vmand.client() as client:
            async with asyncio.timeout(30):
                while (await client.status(one)).reason:  # noqa: ASYNC110 - an event may be older than this
                    await asyncio.sleep(0.05)
            assert (await client.status(one)).state is State.DEPLOYED
            await client.shutdown(one)


async def test_two_daemons_do_not_share_directories(vmand: PrivateVmand, tmp_path: Path) -> None:
    other = PrivateVmand(tmp_path, settings={"runtime_dir": str(vmand.runtime)})
    with pytest.raises(FailedError, match="another vmand uses it"):
        await other.start()


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"runtime_dir": "/tmp/" + "x" * 90}, "bytes too long"),
        ({"runtime_dir": "relative"}, "runtime_dir: 'relative' is not an absolute path"),
        ({"pool": {"cores": "900"}}, "pool.cores: core 900 does not exist"),
        ({"pool": {"cores": "a-b"}}, "pool.cores: 'a-b' is not a core"),
        ({"accelerator": "hyper"}, "accelerator"),
        ({"colour": 1}, "colour: unknown key"),
        ({"memory_dir": "/proc/vmand"}, "memory_dir: /proc/vmand is on proc"),
        ({"launcher": "systemd"}, "launcher: systemd does not run here"),
        ({"access": {"read": ["no-such-group"]}}, "no group 'no-such-group'"),
    ],
)
async def test_bad_settings_end_with_78(tmp_path: Path, settings: dict[str, Any], text: str) -> None:
    if "launcher" in settings and os.access("/run/systemd/system", os.F_OK):
        pytest.skip("systemd runs here")
    one = PrivateVmand(tmp_path, settings=settings)
    one._arguments.append("--check-config")
    one.spawn()
    assert await one.wait(timeout_s=20) == 78
    assert text in one.log_text()
    await one.kill()


async def test_a_killed_client_does_not_undo_its_command(vmand: PrivateVmand, client: VmandClient) -> None:
    other = await vmand.client()
    task = asyncio.create_task(other.create_partition(cores=1, memsize_gb=0.25, mode=Mode.SHARED, name="kept"))
    async with asyncio.timeout(10):
        while not any(".mem" in one for one in vmand.remains()):  # noqa: ASYNC110 - only the directory tells
            await asyncio.sleep(0)
    await other.close()
    with contextlib.suppress(UnavailableError, asyncio.CancelledError):
        task.cancel()
        await task
    async with asyncio.timeout(10):
        while [one.name for one in await client.list_partitions()] != ["kept"]:  # noqa: ASYNC110 - no event tells
            await asyncio.sleep(0.01)


async def test_the_kvm_probe_tells_emulation_and_deadlines_apart(tmp_path: Path) -> None:
    """The probe's guest passes where the CPU does what a CPU does (here: TCG), all the way through user mode."""
    qemu = need_command("qemu-system-x86_64", "qemu-system-x86")
    from vmand.backend import kvm

    bios, letters = tmp_path / "probe.bin", tmp_path / "letters"
    bios.write_bytes(kvm.image())
    argv = ["-machine", "q35", "-accel", "tcg", "-m", "16", "-nodefaults", "-no-user-config", "-display", "none"]
    argv += ["-no-reboot", "-bios", str(bios), "-device", "isa-debug-exit,iobase=0xf4,iosize=1"]
    process = await asyncio.create_subprocess_exec(qemu, *argv, "-debugcon", f"file:{letters}")
    async with asyncio.timeout(30):
        status = await process.wait()
    assert (status, letters.read_text()) == (33, "RPLHSTU")


async def test_the_accelerator_is_tried_and_the_reason_told(tmp_path: Path) -> None:
    need_command("qemu-system-x86_64", "qemu-system-x86")
    from vmand.backend.kvm import Accelerators

    cache = tmp_path / "kvm.json"
    one = Accelerators("qemu-system-x86_64", "auto", cache=cache)
    accelerator, reason = await one.chosen()
    assert (accelerator == "kvm") == (reason == "a tiny guest ran")
    assert reason
    again = Accelerators("qemu-system-x86_64", "auto", cache=cache)
    assert await again.chosen() == (accelerator, reason)
    for setting in ("kvm", "tcg"):
        assert (await Accelerators("none", setting, cache=cache).chosen())[0] == setting
    await one.close()
    await again.close()


SYSTEMD_RUN = """#!/bin/sh
# What systemd-run does as far as vmand can tell: starts the command elsewhere, says nothing.
echo "$@" >"$0.args"
while [ "$1" != -- ]; do shift; done
shift
setsid "$@" </dev/null >/dev/null 2>&1 &
echo $! >"$0.pid"
"""

SYSTEMCTL = """#!/bin/sh
echo "$@" >>"$0.args"
cat "${0%/*}/systemd-run.pid"
"""


async def test_guests_as_transient_units(image: tuple[Path, Path], tmp_path: Path) -> None:
    """The systemd launcher against stand-ins for its two commands; a booted systemd is the system tests' business."""
    for name, text in {"systemd-run": SYSTEMD_RUN, "systemctl": SYSTEMCTL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    settings = {"accelerator": "tcg", "launcher": "systemd", "slice": "x.slice"}
    # A host on which systemd runs, as far as vmand looks: the daemon's own start asks, and may have no way around it.
    (tmp_path / "sitecustomize.py").write_text(
        "import pathlib, vmand.backend.launcher as one\none.SYSTEMD = pathlib.Path('/')\n"
    )
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(tmp_path)}
    async with (
        private_vmand(settings=settings, environment=path) as vmand,
        deployed(vmand, image) as (one, watch),
        await vmand.client() as client,
    ):
        status = await client.status(one)
        assert re.fullmatch(rf"vmand-p-{one}-[0-9a-f]{{8}}\.service", status.unit)
        assert (await client.capabilities()).launcher == "systemd"
        said = (tmp_path / "systemd-run.args").read_text()
        for word in ("--collect", "--service-type=exec", f"--unit={status.unit}", "--slice=x.slice", "KillMode=mixed"):
            assert word in said
        await watch.up()
        await vmand.kill()
        await vmand.start()
        async with await vmand.client() as again:
            assert await again.status(one) == status
            await again.shutdown(one)
            # By the name that the intent fixes, so that a unit which systemd starts late is not left over.
            assert f"stop {status.unit}\n" in (tmp_path / "systemctl.args").read_text()
        assert vmand.guests() == []
