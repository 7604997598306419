"""A disk that virsh attaches to a definition and detaches from it, believed by what a real guest finds."""

from pathlib import Path

from edgehold.testing.capability import need_root
from edgehold.testing.partitions import PrivateVmand
from edgehold.testing.virtvmand import private_virtvmand
from tests.libvirt.guest import printed, type_until
from tests.libvirt.virsh import CMDLINE, Virsh, definition, need_virsh

FOUND = b"echo disk: $(cat /sys/block/vda/size 2>&1) end\r"
NONE = "No such file or directory end"
# Echoed keys have no number there.
THERE = "disk: 2048 end"


async def test_a_guest_has_it_from_its_next_start(vmand: PrivateVmand, image: tuple[Path, Path]) -> None:
    need_virsh()
    need_root()
    async with private_virtvmand(vmand) as daemon:
        virsh = Virsh(daemon=daemon, home=daemon.directory)
        disk, xml = daemon.directory / "disk", daemon.directory / "domain.xml"
        disk.write_bytes(bytes(1 << 20))
        xml.write_text(definition("machine", boot=image, cmdline=f"{CMDLINE} edgehold.shell=ttyS0"))
        await virsh.did(f"define {xml}")
        before = await virsh.did("dumpxml --inactive machine")
        await virsh.did("start machine")
        for command, attached, now, then in (
            (f"attach-disk machine {disk} vda --config", True, NONE, THERE),
            ("detach-disk machine vda --config", False, THERE, NONE),
        ):
            await printed(vmand, "machine")
            await virsh.did(command)
            assert (str(disk) in await virsh.did("domblklist --inactive machine")) == attached
            assert (str(disk) in await virsh.did("domblklist machine")) != attached
            await type_until(vmand, "machine", FOUND, now)
            await virsh.did("destroy machine")
            await virsh.did("start machine")
            await printed(vmand, "machine")
            await type_until(vmand, "machine", FOUND, then)
        assert await virsh.did("dumpxml --inactive machine") == before
        await virsh.did("destroy machine")
        await virsh.did("undefine machine")
    assert not vmand.guests()
    assert not vmand.remains()
