"""The node's disk image: what is in it, and that it comes up, by UEFI and by its kernel alone, on amd64 and arm64.

Under emulation, so minutes each. ``make image`` (and ``make image ARCH=arm64``) builds what is tested. Others by their
names in build/image: ``EDGEHOLD_IMAGES="trixie-amd64"``.
"""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgehold.testing.capability import missing, need_command, need_root
from tests.system.conftest import DAEMONS
from tests.system.vm import Firmware, Machine, Vm, booted
from tests.system.vmimage import add_agent

ROOT = Path(__file__).parents[2]
IMAGES = os.environ.get("EDGEHOLD_IMAGES", "amd64 arm64").split()
BOOT_S = {"amd64": 900.0, "arm64": 1800.0}
ROOT_TYPES = {
    "amd64": "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709",
    "arm64": "B921B045-1DF0-41C3-AF44-4C6F280D3FAE",
}  # the Discoverable Partitions Specification's
FIRMWARE = {
    "amd64": ("OVMF/OVMF_CODE_4M.fd", "OVMF/OVMF_VARS_4M.fd", "ovmf"),
    "arm64": ("AAVMF/AAVMF_CODE.fd", "AAVMF/AAVMF_VARS.fd", "qemu-efi-aarch64"),
}
EMULATORS = {
    "amd64": ("qemu-system-x86_64", "qemu-system-x86"),
    "arm64": ("qemu-system-aarch64", "qemu-system-arm"),
}
# Not under test, and slow under emulation.
MASKED = ("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer", "getty@tty1")
HASH = f"$6$edgehold${'x' * 86}"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f test"
NETWORK = ("-nic", "user,model=virtio-net-pci,restrict=on")


@dataclass(frozen=True, kw_only=True)
class Image:
    """What `make image` made, and where its partitions begin."""

    arch: str
    directory: Path
    esp: int
    root: int

    def debugfs(self, command: str) -> str:
        """What debugfs(8) says of the root file system."""
        argv = [need_command("debugfs", "e2fsprogs"), "-R", command, f"{self.directory}/disk.img?offset={self.root}"]
        return subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60).stdout

    def mtools(self, name: str, disk: Path, *argv: str, text: str = "") -> str:
        """Run a program of mtools(1) on the EFI system partition."""
        argv = (need_command(name, "mtools"), "-i", f"{disk}@@{self.esp}", *argv)
        return subprocess.run(argv, input=text, capture_output=True, text=True, check=True, timeout=60).stdout

    @property
    def entry(self) -> str:
        """The boot entry's path on the EFI system partition."""
        (name,) = self.mtools("mdir", self.directory / "disk.img", "-b", "::loader/entries").split()
        return name


@pytest.fixture(scope="module", params=IMAGES)
def image(request: pytest.FixtureRequest) -> Image:
    need_root()
    suite, _, arch = str(request.param).rpartition("-")
    directory = Path(os.environ.get("BUILD", ROOT / "build")) / "image" / request.param
    if not (directory / "disk.img").exists():
        missing(f"there is no {directory}/disk.img (run: make image ARCH={arch} DIST={suite or 'bookworm'})")
    argv = [need_command("sfdisk", "fdisk"), "--json", str(directory / "disk.img")]
    table = json.loads(subprocess.run(argv, capture_output=True, check=True, timeout=60).stdout)["partitiontable"]
    assert table["label"] == "gpt"
    esp, root = table["partitions"]
    assert (esp["type"], root["type"]) == ("C12A7328-F81F-11D2-BA4B-00A0C93EC93B", ROOT_TYPES[arch])
    assert all(one["start"] % 2048 == 0 for one in (esp, root)), "whole MiB, whatever the disk's blocks"
    return Image(arch=arch, directory=directory, esp=esp["start"] * 512, root=root["start"] * 512)


@pytest.fixture(scope="module")
def disk(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy that answers the tests."""
    need_command(*EMULATORS[image.arch])
    copy = tmp_path_factory.mktemp(image.arch) / "disk.img"
    subprocess.run(["cp", "--sparse=always", image.directory / "disk.img", copy], check=True, timeout=300)
    add_agent(copy, offset=image.root)
    yield copy
    copy.unlink()  # a gigabyte, which pytest would keep


def test_a_node_makes_for_itself_what_only_one_may_have(image: Image) -> None:
    assert image.debugfs("cat /etc/machine-id") == ""
    assert re.search(r"^root:[*!]", image.debugfs("cat /etc/shadow"), re.MULTILINE)
    names = image.debugfs("ls -p /etc/ssh") + image.debugfs("ls -p /var/lib/systemd") + image.debugfs("ls -p /etc")
    assert "/sshd_config/" in names
    assert not re.search(r"/(ssh_host_\w+|random-seed|hostname)/", names)
    assert not re.search(
        r"/(done|node\.toml)/", image.debugfs("ls -p /var/lib/edgehold-node") + image.debugfs("ls -p /etc/edgehold")
    )


def test_the_manifest_tells_what_is_there(image: Image) -> None:
    lines = (image.directory / "manifest").read_text().splitlines()
    sums = {found[2]: found[1] for one in lines if (found := re.fullmatch(r"([0-9a-f]{64})  (\S+)", one))}
    for name in ("vmlinuz", "initrd.img", "cmdline", "disk.img"):
        with (image.directory / name).open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == sums[name], name
    assert any(one.startswith("qemu-system-") for one in lines)
    assert any("edgehold-vmand_" in one for one in lines)


def wait_until_up(vm: Vm, arch: str) -> str:
    """What systemd says when all has been started."""
    return vm.run("systemctl", "is-system-running", "--wait", check=False, timeout_s=BOOT_S[arch]).output.strip()


def assert_all_active(vm: Vm) -> None:
    for name in DAEMONS:
        assert vm.run("systemctl", "is-active", name, check=False).output == "active\n", vm.run(
            "systemctl", "status", name, check=False
        ).output
    assert vm.run("vmanctl", "list", check=False).status == 0


def node(vm: Vm) -> dict[str, object]:
    return tomllib.loads(vm.read("/etc/edgehold/node.toml").decode())


def names(vm: Vm) -> tuple[str, str]:
    return vm.read("/etc/hostname").decode().strip(), vm.run("uname", "-n").output.strip()


def journal(vm: Vm, unit: str) -> str:
    return vm.run("journalctl", "-b", "-o", "cat", "-u", unit).output


def words(entry: str) -> list[str]:
    """Of a boot entry without its comments, in an order of their own."""
    return sorted(word for line in entry.splitlines() if not line.startswith("#") for word in line.split())


@pytest.fixture
def by_firmware(image: Image, disk: Path) -> Iterator[Vm]:
    """Credentials in the boot entry, as a person writes them there, and by the machine's firmware (SMBIOS)."""
    code, variables, package = FIRMWARE[image.arch]
    files = [Path("/usr/share") / one for one in (code, variables)]
    if not all(one.exists() for one in files):
        missing(f"there is no firmware for {image.arch} (Debian package {package})")
    entry = image.mtools("mtype", disk, image.entry)
    given = "systemd.set_credential=edgehold.name:node-17 systemd.set_credential=edgehold.broker:mqtts://broker.example"
    image.mtools(
        "mcopy",
        disk,
        "-o",
        "-",
        image.entry,
        text=re.sub(r"^(options .*)", rf"\1 {options()} {given}", entry, flags=re.MULTILINE),
    )
    smbios = {
        "edgehold.peers": "node-18 10.0.0.3",
        "ssh.authorized_keys.root": KEY,
        "passwd.hashed-password.root": HASH,
    }
    machine = Machine(
        arch=image.arch,
        disk=disk,
        disk_mib=6144,
        firmware=Firmware(code=files[0], variables=files[1]),
        arguments=(
            *NETWORK,
            *(
                word
                for name, value in smbios.items()
                for word in ("-smbios", f"type=11,value=io.systemd.credential:{name}={value}")
            ),
        ),
    )
    try:
        with booted(machine, timeout_s=BOOT_S[image.arch]) as vm:
            yield vm
    finally:
        image.mtools("mcopy", disk, "-o", "-", image.entry, text=entry)


def options() -> str:
    """What a boot under emulation needs, and what spares it minutes."""
    masks = " ".join(f"systemd.mask={one}" for one in MASKED)
    return f"no_timer_check mitigations=off systemd.default_timeout_start_sec=600 {masks}"


@pytest.mark.slow
@pytest.mark.root
def test_by_uefi(image: Image, by_firmware: Vm) -> None:
    vm = by_firmware
    assert wait_until_up(vm, image.arch) == "running", vm.run("systemctl", "--failed").output
    assert_all_active(vm)
    assert node(vm) == {"name": "node-17", "broker": "mqtts://broker.example:8883", "peers": ["node-18", "10.0.0.3"]}
    assert names(vm) == ("node-17", "node-17")
    assert f"\nroot:{HASH}:" in "\n" + vm.read("/etc/shadow").decode()
    assert vm.run("stat", "-c", "%U:%G %a", "/etc/shadow").output == "root:shadow 640\n"
    # Somebody gave a key: sshd listens, with keys of its own.
    assert vm.read("/root/.ssh/authorized_keys").decode().strip() == KEY
    vm.wait("systemctl", "is-active", "ssh")
    assert vm.shell("ls /etc/ssh/ssh_host_*_key | wc -l").output.strip() != "0"
    # The disk is larger than the image, and all of it is the node's.
    assert int(vm.run("df", "--output=size", "-BM", "/").output.split()[1].rstrip("M")) > 5000
    first = vm.read("/etc/machine-id")
    assert re.fullmatch(rb"[0-9a-f]{32}\n", first)
    vm.wait("sh", "-c", "ip -4 -o addr show scope global | grep -q 10.0.2.")

    # A kernel that dpkg installs gets to the partition that the firmware boots from, with the command line of the file.
    before = vm.read(f"/boot/efi{image.entry[2:]}").decode()
    vm.run("bootctl", "is-installed")
    kept = vm.read("/etc/kernel/cmdline").decode().strip()
    vm.write("/etc/kernel/cmdline", f"{kept} {options()}\n".encode())
    vm.shell("kernel=$(uname -r); /etc/kernel/postinst.d/zz-systemd-boot $kernel /boot/vmlinuz-$kernel", timeout_s=600)
    after = vm.read(f"/boot/efi{image.entry[2:]}").decode()
    assert words(after) == [one for one in words(before) if "set_credential" not in one]

    vm.reboot(timeout_s=BOOT_S[image.arch])
    assert wait_until_up(vm, image.arch) == "running"
    assert_all_active(vm)
    assert "set_credential" not in vm.read("/proc/cmdline").decode()
    assert (names(vm), node(vm)["broker"]) == (("node-17", "node-17"), "mqtts://broker.example:8883")
    assert vm.read("/etc/machine-id") == first
    assert journal(vm, "edgehold-firstboot") == "" or "skipped" in journal(vm, "edgehold-firstboot")
    vm.power_off()


@pytest.mark.slow
@pytest.mark.root
def test_by_its_kernel_alone_with_a_wrong_name(image: Image, disk: Path) -> None:
    """The boot goes on, and says what is wrong; the next one has the right name."""
    machine = Machine(
        arch=image.arch,
        disk=disk,
        kernel=image.directory / "vmlinuz",
        initrd=image.directory / "initrd.img",
        cmdline=(image.directory / "cmdline").read_text().strip(),
        masked=MASKED,
        credentials={"edgehold.name": b"node_17", "edgehold.peers": b"node-18"},
        arguments=NETWORK,
    )
    with booted(machine, timeout_s=BOOT_S[image.arch]) as vm:
        assert wait_until_up(vm, image.arch) == "degraded"
        assert_all_active(vm)
        own = f"edgehold-{vm.read('/etc/machine-id').decode()[:8]}"
        assert names(vm) == (own, own)
        assert node(vm) == {"name": own, "peers": ["node-18"]}
        failed = vm.run("systemctl", "--failed", "--plain", "--no-legend").output
        assert [one.split()[0] for one in failed.splitlines()] == ["edgehold-firstboot.service"]
        assert "credential edgehold.name: 'node_17' is no host name" in journal(vm, "edgehold-firstboot")
        assert vm.run("systemctl", "show", "-P", "ExecMainStatus", "edgehold-firstboot").output == "78\n"
        # Nobody gave a key: nothing listens but on the loopback interface. Port 68 is where DHCP's answers come in.
        listening = vm.run("ss", "-Htuln").output
        assert listening
        for line in listening.splitlines():
            address = line.split()[4]
            assert address.startswith(("127.0.0.", "[::1]")) or address.endswith((":68", ":546")), listening
        assert vm.run("systemctl", "is-active", "ssh", check=False).output == "inactive\n"

        vm.power_off()
        vm.machine = dataclasses.replace(machine, credentials={"edgehold.name": b"node-17"})
        (vm._directory / "credential-edgehold.name").write_bytes(b"node-17")
        vm.start(timeout_s=BOOT_S[image.arch])
        assert wait_until_up(vm, image.arch) == "running"
        assert names(vm) == ("node-17", "node-17")
        assert node(vm) == {"name": "node-17", "peers": ["node-18"]}
        assert_all_active(vm)
        vm.power_off()
