"""vmanctl's commands that change something."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from edgehold.api.vmand import Disk, Mode, Nic, Partition, VmandClient, Which
from edgehold.cli import Output
from edgehold.errors import EdgeholdError
from vmand.cli_options import PARTITION, PATH, TIMEOUT_S, DiskType, NicType, Number, ask, option, options
from vmand.cli_show import said


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What a partition is to be."""

    cores: int
    memsize: float
    secure: bool
    mode: str
    name: str
    strict: bool

    async def create(self, vmand: VmandClient) -> int:
        return await vmand.create_partition(
            cores=self.cores,
            memsize_gb=self.memsize,
            secure=self.secure,
            mode=Mode(self.mode),
            name=self.name,
            strict=self.strict,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Guest:
    """What is to run in it."""

    kernel: Path
    initrd: Path | None
    dtb: Path | None
    cmdline: str
    disks: tuple[Disk, ...]
    nics: tuple[Nic, ...]
    vsock: bool
    agent: bool
    paused: bool

    async def deploy(self, vmand: VmandClient, partition: Which) -> None:
        given: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        await vmand.deploy(partition, **given)


_CORES = click.IntRange(1, 4096)
_MEMSIZE = Number(0, min_open=True)
_MODES = click.Choice([one.value for one in Mode])
_WANTED = options(
    option("cores", type=_CORES, required=True, help="How many cores."),
    option("memsize", type=_MEMSIZE, required=True, help="Memory in GiB; may be a fraction."),
    option("secure", type=click.BOOL, default=False, help="true: the secure world, where there is one."),
    option(
        "mode",
        type=_MODES,
        default=Mode.DEDICATED.value,
        show_default=True,
        help="dedicated: cores of its own; takes no SCHED_DEADLINE reservation. shared: sized by deadlined.",
    ),
    option("strict", is_flag=True, help="Refuse what can't have isolated cores, now and at deploy."),
    option("name", default="", help="A name beside the id."),
)
_GUEST = options(
    option("kernel", type=PATH, required=True, help="The kernel's image, for x86-64 or arm64."),
    option("initrd", type=PATH, help="An initial RAM disk."),
    option("dtb", type=PATH, help="A device tree, for guests that take one."),
    option("cmdline", default="", help="The kernel's command line."),
    option(
        "disk",
        "disks",
        type=DiskType(),
        metavar="PATH[,format=qcow2][,readonly]",
        multiple=True,
        help="A disk; may be repeated.",
    ),
    option(
        "nic",
        "nics",
        type=NicType(),
        metavar="BRIDGE[,mac=ADDRESS]",
        multiple=True,
        help="A network interface in a bridge; may be repeated.",
    ),
    option("vsock", is_flag=True, help="An address for vsock(7)."),
    option("agent", is_flag=True, help="A channel for a guest agent."),
    option("paused", is_flag=True, help="Load the guest and leave it SUSPENDED; restore lets it begin."),
)


@click.command("create-partition")
@_WANTED
@click.pass_obj
def create_partition(output: Output, /, **wanted: Any) -> None:
    """Reserve cores and memory; prints the partition's id."""
    made = ask(
        output,
        _Wanted(**wanted).create,
        doing="reserving cores and memory",
        interrupted="vmand may have created it: vmanctl list",
    )
    output.show({"id": made}, lambda: str(made))


@click.command()
@PARTITION
@_GUEST
@click.pass_obj
def deploy(output: Output, /, *, partition: Which, **guest: Any) -> None:
    """Load and start a guest in a READY partition."""

    async def work(vmand: VmandClient) -> Partition:
        await _Guest(**guest).deploy(vmand, partition)
        return await vmand.status(partition)

    _say(output, ask(output, work, doing=f"deploying {partition}", interrupted=_goes_on(partition)))


@click.command()
@_WANTED
@_GUEST
@click.pass_obj
def start(output: Output, /, **given: Any) -> None:
    """Create a partition and deploy a guest in it; prints the id.

    If the guest can't be deployed, the partition is destroyed again.
    """
    wanted = _Wanted(**{one.name: given.pop(one.name) for one in fields(_Wanted)})
    guest = _Guest(**given)

    async def work(vmand: VmandClient) -> int:
        made = await wanted.create(vmand)
        try:
            await guest.deploy(vmand, made)
        except EdgeholdError as error:
            raise await _undone(vmand, made, error) from None
        return made

    made = ask(output, work, doing="starting a partition", interrupted="vmand may go on with it: vmanctl list")
    output.show({"id": made}, lambda: str(made))


async def _undone(vmand: VmandClient, partition: int, error: EdgeholdError) -> EdgeholdError:
    """The refusal of a deploy, with what became of the partition that was made for it."""
    try:
        await vmand.destroy_partition(partition)
    except EdgeholdError as stays:
        end = f"partition {partition} could not be destroyed again: {stays.message}"
    else:
        end = f"partition {partition} is destroyed again"
    return type(error)(f"{error.message}; {end}", code=error.code, retryable=error.retryable)


@click.command()
@PARTITION
@option("timeout", "timeout_s", type=TIMEOUT_S, help="Seconds until it is ended by force.")
@option("force", is_flag=True, help="End it at once, also while another shutdown waits for the guest.")
@option("leave", is_flag=True, help="Never end it by force: a guest that is not off in time goes on.")
@click.pass_obj
def shutdown(output: Output, *, partition: Which, timeout_s: float | None, force: bool, leave: bool) -> None:
    """Power the guest off; cores and memory stay reserved."""
    if force and leave:
        raise click.UsageError("--force ends the guest and --leave never does; give one of them")

    async def work(vmand: VmandClient) -> Partition:
        await vmand.shutdown(partition, timeout_s=timeout_s, force=force, leave=leave)
        return await vmand.status(partition)

    limit_s = None if force else timeout_s
    done = ask(output, work, doing=f"shutting down {partition}", limit_s=limit_s, interrupted=_goes_on(partition))
    _say(output, done)


@click.command()
@PARTITION
@option("graceful", is_flag=True, help="Press the power button first, and reset by force only when the time is over.")
@option("timeout", "timeout_s", type=TIMEOUT_S, help="With --graceful: seconds until it is reset by force.")
@click.pass_obj
def reboot(output: Output, *, partition: Which, graceful: bool, timeout_s: float | None) -> None:
    """Reset the guest by force and load its kernel again."""
    if timeout_s is not None and not graceful:
        raise click.UsageError("--timeout is for --graceful: a reset by force waits for nobody")

    async def work(vmand: VmandClient) -> Partition:
        await vmand.reboot(partition, graceful=graceful, timeout_s=timeout_s)
        return await vmand.status(partition)

    done = ask(output, work, doing=f"rebooting {partition}", limit_s=timeout_s, interrupted=_goes_on(partition))
    _say(output, done)


@click.command()
@PARTITION
@click.pass_obj
def suspend(output: Output, *, partition: Which) -> None:
    """Stop the guest's CPUs; its state is kept."""
    _simple(output, partition, VmandClient.suspend)


@click.command()
@PARTITION
@click.pass_obj
def restore(output: Output, *, partition: Which) -> None:
    """Let a suspended guest go on."""
    _simple(output, partition, VmandClient.restore)


@click.command("destroy-partition")
@PARTITION
@click.pass_obj
def destroy_partition(output: Output, *, partition: Which) -> None:
    """Give the partition's cores and memory back."""

    async def work(vmand: VmandClient) -> int:
        one = await vmand.status(partition)  # a name is gone with its partition
        await vmand.destroy_partition(one.id)
        return one.id

    gone = ask(output, work, doing=f"destroying {partition}", interrupted=_goes_on(partition))
    output.show({"id": gone}, lambda: f"partition {gone} is gone")


@click.command("change-partition")
@PARTITION
@option("name", help="Another name.")
@option("cores", type=_CORES, help="How many cores.")
@option("memsize", "memsize_gb", type=_MEMSIZE, help="Memory in GiB; may be a fraction.")
@option("secure", type=click.BOOL, help="true: the secure world, where there is one.")
@option("mode", type=_MODES, help="dedicated or shared.")
@option("strict", type=click.BOOL, help="true: refuse what can't have isolated cores.")
@click.pass_obj
def change_partition(output: Output, /, *, partition: Which, mode: str | None, **given: Any) -> None:
    """Give a READY partition another name or another share of the host."""
    if mode is None and all(one is None for one in given.values()):
        raise click.UsageError("nothing is to be changed; --help shows what can be")

    async def work(vmand: VmandClient) -> Partition:
        return await vmand.change_partition(partition, mode=Mode(mode) if mode else None, **given)

    _say(output, ask(output, work, doing=f"changing {partition}", interrupted=_goes_on(partition)))


def _simple(output: Output, partition: Which, command: Callable[[VmandClient, Which], Awaitable[None]]) -> None:
    async def work(vmand: VmandClient) -> Partition:
        await command(vmand, partition)
        return await vmand.status(partition)

    _say(output, ask(output, work, interrupted=_goes_on(partition)))


def _goes_on(partition: Which) -> str:
    return f"vmand goes on with it: vmanctl status {partition}"


def _say(output: Output, one: Partition) -> None:
    output.show(one, lambda: said(one))
