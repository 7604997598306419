"""``vmanctl``: vmand's commands by hand. The documents' spellings (``-cores 2``) work beside the usual ones."""

from pathlib import Path
from typing import Any

import click

from edgehold.api.vmand import DEFAULT_SOCKET, Mode, Partition, State, VmandClient
from edgehold.cli import Output, client_group, completion_command, table, wait_for
from edgehold.cli import main as run_group
from edgehold.errors import NotFoundError

_HELP = "Hard partitions on this host. PARTITION is an id or a name; a number is always an id."
_PARTITION = click.argument("partition")
_PATH = click.Path(path_type=Path, resolve_path=True)


@client_group(default_socket=DEFAULT_SOCKET, variable="VMAND_SOCKET", help_text=_HELP)
def vmanctl() -> None:
    """The group; `client_group` makes it."""


async def _id(vmand: VmandClient, partition: str) -> int:
    """The partition of this id, else of this name. What is a number is never a name: it would hit another partition."""
    if partition.isascii() and partition.isdigit():
        return int(partition)
    for one in await vmand.list_partitions():
        if one.name == partition:
            return one.id
    raise NotFoundError(f"there is no partition {partition!r}; vmanctl list shows ids and names")


def _row(one: Partition) -> list[object]:
    cores = ",".join(map(str, one.cpus)) or str(one.cores)
    return [
        one.id,
        one.name,
        one.state.value,
        one.mode.value,
        cores,
        f"{one.memory_bytes / 2**30:.2f}",
        one.reason or "-",
    ]


@vmanctl.command("create-partition")
@click.option("-cores", "--cores", type=int, required=True, help="How many cores.")
@click.option("-memsize", "--memsize", type=float, required=True, help="Memory in GiB; may be a fraction.")
@click.option("-secure", "--secure", type=click.BOOL, default=False, help="true: the secure world, where there is one.")
@click.option(
    "-mode",
    "--mode",
    type=click.Choice([one.value for one in Mode]),
    default=Mode.DEDICATED.value,
    show_default=True,
    help="dedicated: cores of its own, pinned; takes no SCHED_DEADLINE reservation. shared: sized by deadlined.",
)
@click.option("-name", "--name", default="", help="A name beside the id.")
@click.pass_obj
def create_partition(output: Output, *, cores: int, memsize: float, secure: bool, mode: str, name: str) -> None:
    """Reserve cores and memory; prints the partition's id."""

    async def work() -> int:
        async with await VmandClient.connect(output.socket) as vmand:
            return await vmand.create_partition(
                cores=cores, memsize_gb=memsize, secure=secure, mode=Mode(mode), name=name
            )

    made = wait_for(work())
    output.show({"id": made}, lambda: str(made))


@vmanctl.command()
@_PARTITION
@click.option("-kernel", "--kernel", type=_PATH, required=True, help="The kernel's image.")
@click.option("-initrd", "--initrd", type=_PATH, help="An initial RAM disk.")
@click.option("-dtb", "--dtb", type=_PATH, help="A device tree, for guests that take one.")
@click.option("-cmdline", "--cmdline", default="", help="The kernel's command line.")
@click.pass_obj
def deploy(
    output: Output, *, partition: str, kernel: Path, initrd: Path | None, dtb: Path | None, cmdline: str
) -> None:
    """Load and start a guest in a READY partition."""

    async def work() -> Partition:
        async with await VmandClient.connect(output.socket) as vmand:
            one = await _id(vmand, partition)
            await vmand.deploy(one, kernel=kernel, initrd=initrd, dtb=dtb, cmdline=cmdline)
            return await vmand.status(one)

    _say(output, wait_for(work()))


@vmanctl.command()
@_PARTITION
@click.option("-timeout", "--timeout", "timeout_s", type=float, help="Seconds until it is ended by force.")
@click.option("-force", "--force", is_flag=True, help="End it at once.")
@click.pass_obj
def shutdown(output: Output, *, partition: str, timeout_s: float | None, force: bool) -> None:
    """Power the guest off; cores and memory stay reserved."""

    async def work() -> Partition:
        async with await VmandClient.connect(output.socket) as vmand:
            one = await _id(vmand, partition)
            await vmand.shutdown(one, timeout_s=timeout_s, force=force)
            return await vmand.status(one)

    _say(output, wait_for(work()))


def _simple(name: str, help_text: str) -> None:
    @vmanctl.command(name, help=help_text)
    @_PARTITION
    @click.pass_obj
    def command(output: Output, *, partition: str) -> None:
        async def work() -> Partition:
            async with await VmandClient.connect(output.socket) as vmand:
                one = await _id(vmand, partition)
                await getattr(vmand, name)(one)
                return await vmand.status(one)

        _say(output, wait_for(work()))


_simple("suspend", "Stop the guest's CPUs; its state is kept.")
_simple("restore", "Let a suspended guest go on.")
_simple("reboot", "Reset the guest by force.")


@vmanctl.command("destroy-partition")
@_PARTITION
@click.pass_obj
def destroy_partition(output: Output, *, partition: str) -> None:
    """Give the partition's cores and memory back."""

    async def work() -> int:
        async with await VmandClient.connect(output.socket) as vmand:
            one = await _id(vmand, partition)
            await vmand.destroy_partition(one)
            return one

    gone = wait_for(work())
    output.show({"id": gone}, lambda: f"partition {gone} is gone")


@vmanctl.command("list")
@click.pass_obj
def list_partitions(output: Output) -> None:
    """All partitions."""

    async def work() -> list[Partition]:
        async with await VmandClient.connect(output.socket) as vmand:
            return await vmand.list_partitions()

    found = wait_for(work())
    header = ["ID", "NAME", "STATE", "MODE", "CORES", "GIB", "REASON"]
    output.show(found, lambda: table(header, map(_row, found)))


@vmanctl.command()
@_PARTITION
@click.pass_obj
def status(output: Output, *, partition: str) -> None:
    """One partition, all that is known of it."""

    async def work() -> Partition:
        async with await VmandClient.connect(output.socket) as vmand:
            return await vmand.status(await _id(vmand, partition))

    _details(output, wait_for(work()))


@vmanctl.command()
@_PARTITION
@click.pass_obj
def vcpus(output: Output, *, partition: str) -> None:
    """The host's threads that run the guest's CPUs."""

    async def work() -> Any:
        async with await VmandClient.connect(output.socket) as vmand:
            return await vmand.vcpus(await _id(vmand, partition))

    found = wait_for(work())
    output.show(found, lambda: table(["VCPU", "TID"], [[one.index, one.tid] for one in found]))


@vmanctl.command()
@_PARTITION
@click.option("-follow", "--follow", is_flag=True, help="Go on until interrupted or the partition is gone.")
@click.pass_obj
def console(output: Output, *, partition: str, follow: bool) -> None:
    """What the guest printed last on its console."""

    async def work() -> None:
        async with await VmandClient.connect(output.socket) as vmand:
            one = await _id(vmand, partition)
            if not follow:
                text = await vmand.console(one)
                output.show({"text": text}, text.rstrip)
                return
            click.echo(await vmand.subscribe(one, console=True), nl=False)
            async for event in vmand.events():
                if event.kind == "console":
                    click.echo(event.text, nl=False)
                elif event.kind == "gone":
                    return

    wait_for(work())


@vmanctl.command()
@click.argument("partition", required=False)
@click.option("-console", "--console", "with_console", is_flag=True, help="The guests' consoles too.")
@click.pass_obj
def events(output: Output, *, partition: str | None, with_console: bool) -> None:
    """Print what happens to a partition or to all, until interrupted.

    A line is the partition's id, the kind (state, console or gone), and the new state with its reason or the output.
    """

    async def work() -> None:
        async with await VmandClient.connect(output.socket) as vmand:
            wanted = await _id(vmand, partition) if partition is not None else None
            await vmand.subscribe(wanted, console=with_console)
            async for one in vmand.events():
                state = one.state.value if isinstance(one.state, State) else ""
                text = " ".join(filter(None, [str(one.partition), one.kind, state, one.reason, one.text.rstrip()]))
                output.show(one, lambda text=text: text)  # type: ignore[misc]

    wait_for(work())


@vmanctl.command()
@click.pass_obj
def capabilities(output: Output) -> None:
    """What this host can give, and why not where it can't."""

    async def work() -> Any:
        async with await VmandClient.connect(output.socket) as vmand:
            return await vmand.capabilities()

    _details(output, wait_for(work()))


def _say(output: Output, one: Partition) -> None:
    reason = f" ({one.reason})" if one.reason else ""
    output.show(one, lambda: f"partition {one.id}: {one.state.value}{reason}")


def _shown(name: str, value: object) -> str:
    """A field for people: nothing is a dash, bytes are also in the unit that they were asked for in."""
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{value} ({value / 2**30:.2f} GiB)" if value >= 2**30 else f"{value} ({value // 2**20} MiB)"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "-" if value is None or value == "" else str(value)


def _details(output: Output, value: Any) -> None:
    def text() -> str:
        rows = [[name, _shown(name, getattr(value, name))] for name in value.__struct_fields__]
        return table(["FIELD", "VALUE"], rows)

    output.show(value, text)


completion_command(vmanctl, "vmanctl")


def main() -> None:
    """The command's entry."""
    run_group(vmanctl, "vmanctl")


if __name__ == "__main__":
    main()
