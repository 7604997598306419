"""Capabilities as clients read them: libvirt's own schemas, and what Nova and virt-install look for."""

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree as ET

import msgspec
import pytest

from edgehold.api.vmand import Capabilities, CoresGrade, MemoryGrade
from edgehold.testing.capability import missing, need_command
from virtvmand import domaincaps, hostxml
from virtvmand.errors import Code, LibvirtError
from virtvmand.markup import leaf, tag

SCHEMAS = Path("/usr/share/libvirt/schemas")
X86 = Capabilities(
    accelerator="tcg",
    accelerator_reason="no /dev/kvm",
    backend="qemu",
    launcher="process",
    cores_grade=CoresGrade.PINNED,
    cores_reason="",
    memory_grade=MemoryGrade.PLAIN,
    memory_reason="",
    supports=("console", "shared", "suspend"),
    archs=("aarch64", "x86_64"),
    cores_pool=(1, 2, 3),
    cores_free=(1, 2, 3),
    memory_total_bytes=1 << 30,
    memory_free_bytes=1 << 29,
)
KVM = msgspec.structs.replace(X86, accelerator="kvm")
FIRMWARE = msgspec.structs.replace(
    X86, accelerator="firmware", backend="vmanager", archs=("aarch64",), supports=("suspend",)
)
HOSTS = [("x86_64", X86), ("x86_64", KVM), ("aarch64", KVM), ("aarch64", FIRMWARE)]
# nova/objects/fields.py, HVType: another name raises InvalidHypervisorVirtType.
NOVA_KNOWS = {"kvm", "qemu", "lxc", "xen", "test", "vmware", "hyperv", "parallels"}


def programs(name: str) -> str | None:
    return f"/usr/bin/{name}"


def tree(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else f"{data}\n".encode())
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host with two nodes, one of them memory alone, and a CPU of which the kernel tells no place."""
    cpus, nodes = "sys/devices/system/cpu", "sys/devices/system/node"
    files = {
        "proc/meminfo": "MemTotal: 3000 kB\nMemFree: 2000 kB\nBuffers: 1 kB\nCached: 1 kB",
        f"{cpus}/online": "0-2",
        f"{cpus}/present": "0-3",
        f"{nodes}/node0/cpulist": "0-2",
        f"{nodes}/node0/meminfo": "Node 0 MemTotal: 2000 kB\nNode 0 MemFree: 1500 kB",
        f"{nodes}/node0/distance": "10 20",
        f"{nodes}/node1/cpulist": "",
        f"{nodes}/node1/meminfo": "Node 1 MemTotal: 1000 kB\nNode 1 MemFree: 500 kB",
        f"{nodes}/node1/distance": "20 10",
        "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "0",
        "etc/machine-id": "0123456789abcdef0123456789abcdef",
    }
    for cpu in (0, 1):
        below = f"{cpus}/cpu{cpu}/topology"
        files |= {f"{below}/core_id": "0", f"{below}/physical_package_id": "0", f"{below}/core_cpus_list": "0-1"}
    return tree(tmp_path, files)


def capabilities(root: Path, caps: Capabilities = X86, native: str = "x86_64") -> str:
    return hostxml.capabilities_xml(
        caps, proc=root / "proc", sysfs=root / "sys", machine_id=root / "etc/machine-id", native=native, which=programs
    )


def domain(caps: Capabilities = X86, native: str = "x86_64", /, **asked: str | None) -> str:
    return domaincaps.domain_capabilities_xml(caps, native=native, which=programs, **asked)


def parse(text: str) -> ET.Element:
    return ET.fromstring(text)  # noqa: S314 - we have written it


def texts(element: ET.Element, path: str) -> list[str | None]:
    return [one.text for one in element.iterfind(path)]


def validate(schema: str, text: str, scratch: Path) -> None:
    need_command("xmllint", "libxml2-utils")
    if not (SCHEMAS / schema).exists():
        missing(f"{SCHEMAS / schema} is not there (Debian package libvirt0)")
    (scratch / "document.xml").write_text(text)
    done = subprocess.run(
        ["xmllint", "--nonet", "--noout", "--relaxng", SCHEMAS / schema, scratch / "document.xml"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# Capabilities


@pytest.mark.parametrize(("native", "caps"), HOSTS)
def test_capabilities_follow_libvirt_s_schema(root: Path, native: str, caps: Capabilities) -> None:
    validate("capability.rng", capabilities(root, caps, native), root)


def test_capabilities_of_this_host(tmp_path: Path) -> None:
    validate("capability.rng", hostxml.capabilities_xml(X86), tmp_path)


def test_the_host_as_it_is_built(root: Path) -> None:
    host = parse(capabilities(root)).find("host")
    assert host is not None
    assert len(texts(host, "uuid")) == 1
    assert texts(host, "cpu/arch") == ["x86_64"]
    topology = host.find("cpu/topology")
    assert topology is not None
    assert {name: int(value) for name, value in topology.items()} == {"sockets": 1, "dies": 1, "cores": 2, "threads": 2}
    cells = host.find("topology")
    assert cells is not None
    first, second = cells[0]  # Nova takes the first child for the list of cells
    assert [first.findtext("memory"), second.findtext("memory")] == ["2000", "1000"]
    assert [dict(one.items()) for one in first.iterfind("cpus/cpu")] == [
        {"id": "0", "socket_id": "0", "die_id": "0", "core_id": "0", "siblings": "0,1"},
        {"id": "1", "socket_id": "0", "die_id": "0", "core_id": "0", "siblings": "0,1"},
        {"id": "2"},  # all that is known
    ]
    assert [dict(one.items()) for one in second.iterfind("distances/sibling")] == [
        {"id": "0", "value": "20"}, {"id": "1", "value": "10"},
    ]  # fmt: skip
    for pages in host.iter("pages"):
        assert int(pages.get("size", "")) in {4, 16, 64, 2048}


def test_what_is_not_known_is_left_out(root: Path) -> None:
    (root / "etc/machine-id").unlink()
    shutil.rmtree(root / "sys/devices/system/node")
    (root / "proc/meminfo").write_text("MemTotal: 3000 kB\n")
    host = parse(capabilities(root)).find("host")
    assert host is not None
    assert host.find("uuid") is None
    assert host.find("cpu/model") is None
    assert [one.findtext("memory") for one in host.iterfind("topology/cells/cell")] == ["3000"]


@pytest.mark.parametrize(
    ("native", "caps", "expected"),
    [
        ("x86_64", X86, {"x86_64": ["qemu"], "aarch64": ["qemu"]}),
        ("x86_64", KVM, {"x86_64": ["qemu", "kvm"], "aarch64": ["qemu"]}),
        ("aarch64", KVM, {"aarch64": ["qemu", "kvm"], "x86_64": ["qemu"]}),
        ("aarch64", FIRMWARE, {"aarch64": ["kvm"]}),
    ],
)
def test_guests(root: Path, native: str, caps: Capabilities, expected: dict[str, list[str]]) -> None:
    guests = list(parse(capabilities(root, caps, native)).iterfind("guest"))
    found = {}
    for guest in guests:
        arch = guest.find("arch")
        assert arch is not None
        assert (guest.findtext("os_type"), arch.findtext("wordsize")) == ("hvm", "64")
        domains = list(arch.iterfind("domain"))
        assert not any(map(list, domains))  # Nova: emulator and machines beside a domain are those of one without any
        found[arch.get("name")] = [one.get("type") for one in domains]
        emulator = f"/usr/bin/qemu-system-{arch.get('name')}" if caps.backend == "qemu" else None
        assert arch.findtext("emulator") == emulator
    assert list(found.items()) == list(expected.items())  # the host's own is the first: clients' default
    assert {kind for kinds in found.values() for kind in kinds} <= NOVA_KNOWS


def test_nova_finds_the_machine_that_it_asks_for(root: Path) -> None:
    """It looks the machine up among names and aliases, and asks domain capabilities for "pc" and each alias."""
    machines = parse(capabilities(root)).findall("guest/arch[@name='x86_64']/machine")
    aliases = {one.text: one.get("canonical") for one in machines if one.get("canonical")}
    assert [one.text for one in machines if not one.get("canonical")] == ["q35"]
    assert aliases == {"pc": "q35"}
    for name in aliases:
        assert parse(domain(arch="x86_64", machine=name)).findtext("machine") == "q35"


def test_an_architecture_that_we_do_not_know_is_left_out(root: Path) -> None:
    caps = msgspec.structs.replace(X86, archs=("x86_64", "riscv64"))
    guests = parse(capabilities(root, caps)).findall("guest/arch")
    assert [one.get("name") for one in guests] == ["x86_64"]


def test_a_host_that_runs_nothing(root: Path) -> None:
    caps = msgspec.structs.replace(X86, archs=())
    assert parse(capabilities(root, caps)).findall("guest") == []
    with pytest.raises(LibvirtError, match="no architecture") as caught:
        domain(caps)
    assert caught.value.code is Code.INVALID_ARG


@pytest.mark.parametrize(("caps", "cpus", "most"), [(X86, 8, 8), (X86, 2, 3), (FIRMWARE, 8, 3)])
def test_the_most_vcpus(caps: Capabilities, cpus: int, most: int) -> None:
    assert domaincaps.max_vcpus(caps, cpus=cpus) == most


# Domain capabilities


@pytest.mark.parametrize(("native", "caps"), HOSTS)
def test_domain_capabilities_follow_libvirt_s_schema(tmp_path: Path, native: str, caps: Capabilities) -> None:
    for arch in caps.archs:
        text = domain(caps, native, arch=arch)
        root = parse(text)
        schema = SCHEMAS / "domaincaps.rng"
        if schema.exists() and "console" not in schema.read_text():  # libvirt before 11
            devices, console = root.find("devices"), root.find("devices/console")
            assert devices is not None
            assert console is not None
            devices.remove(console)
        if root.find("path") is None:  # the firmware's guests have no emulator; older schemas ask for one
            root.insert(0, parse("<path>/none</path>"))
        validate("domaincaps.rng", ET.tostring(root, encoding="unicode"), tmp_path)


@pytest.mark.parametrize(("native", "caps"), HOSTS)
def test_what_nova_reads(native: str, caps: Capabilities) -> None:
    root = parse(domain(caps, native))
    assert root.tag == "domainCapabilities"
    assert root.findtext("machine")
    for path in ("os/loader", "devices/tpm", "devices/video", "devices/graphics", "features/sev"):
        element = root.find(path)
        assert element is not None, path
        assert element.get("supported") == "no"
    # It takes every enum of this name in the document for disks'.
    assert texts(root, ".//enum[@name='bus']/value") == ["virtio"]
    assert texts(root, "devices/disk/enum[@name='diskDevice']/value") == ["disk"]


@pytest.mark.parametrize(
    ("native", "caps", "arch", "modes"),
    [
        ("x86_64", X86, "x86_64", ["maximum"]),
        ("x86_64", KVM, "x86_64", ["host-passthrough"]),
        ("x86_64", KVM, "aarch64", ["custom"]),
        ("aarch64", KVM, "aarch64", ["host-passthrough"]),
        ("aarch64", FIRMWARE, "aarch64", ["host-passthrough"]),
    ],
)
def test_the_cpu_is_what_vmand_gives(native: str, caps: Capabilities, arch: str, modes: list[str]) -> None:
    root = parse(domain(caps, native, arch=arch))
    assert [one.get("name") for one in root.iterfind("cpu/mode[@supported='yes']")] == modes
    assert texts(root, "cpu/mode/model") == (["cortex-a72"] if modes == ["custom"] else [])


@pytest.mark.parametrize(
    ("caps", "arch", "supported", "versions"),
    [(X86, "x86_64", "no", []), (X86, "aarch64", "yes", ["3"]), (FIRMWARE, "aarch64", "yes", [])],
)
def test_interrupt_controllers(caps: Capabilities, arch: str, supported: str, versions: list[str]) -> None:
    gic = parse(domain(caps, arch=arch)).find("features/gic")
    assert gic is not None
    assert gic.get("supported") == supported
    assert texts(gic, "enum[@name='version']/value") == versions


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, ("/usr/bin/qemu-system-x86_64", "kvm", "q35", "x86_64")),
        ({"emulator": "/usr/bin/qemu-system-aarch64"}, ("/usr/bin/qemu-system-aarch64", "qemu", "virt", "aarch64")),
        ({"arch": "aarch64", "machine": "virt"}, ("/usr/bin/qemu-system-aarch64", "qemu", "virt", "aarch64")),
        ({"virttype": "qemu"}, ("/usr/bin/qemu-system-x86_64", "qemu", "q35", "x86_64")),
        ({"virttype": "vman"}, ("/usr/bin/qemu-system-x86_64", "kvm", "q35", "x86_64")),
        ({"emulator": "", "arch": "", "machine": "", "virttype": ""},
         ("/usr/bin/qemu-system-x86_64", "kvm", "q35", "x86_64")),
    ],
)  # fmt: skip
def test_what_is_not_asked_for_is_the_default(asked: dict[str, str], expected: tuple[str, ...]) -> None:
    root = parse(domain(KVM, **asked))
    assert tuple(root.findtext(one) for one in ("path", "domain", "machine", "arch")) == expected


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"arch": "riscv64"}, "arch: this host has no 'riscv64'; use aarch64 or x86_64"),
        ({"machine": "isapc"}, "machine: this host has no 'isapc' for x86_64; use q35 or pc"),
        ({"arch": "aarch64", "machine": "q35"}, "machine: .* for aarch64; use virt"),
        ({"virttype": "kvm"}, "virttype: this host has no 'kvm' for x86_64; use qemu or vman"),
        ({"virttype": "lxc"}, "virttype"),
        ({"emulator": "/bin/sh"}, "emulatorbin: .*; use /usr/bin/qemu-system-aarch64 or /usr/bin/qemu-system-x86_64"),
        ({"emulator": "/usr/bin/qemu-system-x86_64", "arch": "aarch64"}, "emulatorbin: .* for aarch64"),
    ],
)
def test_what_this_host_does_not_run(asked: dict[str, str], text: str) -> None:
    with pytest.raises(LibvirtError, match=text) as caught:
        domain(X86, **asked)
    assert caught.value.code is Code.INVALID_ARG


def test_without_an_emulator_there_is_no_path() -> None:
    root = parse(domain(FIRMWARE, "aarch64"))
    assert root.find("path") is None
    with pytest.raises(LibvirtError, match=r"emulatorbin: .*; name none$"):
        domain(FIRMWARE, "aarch64", emulator="/usr/bin/qemu-system-aarch64")


# What the firmware says


def test_smbios(tmp_path: Path) -> None:
    below = "class/dmi/id"
    files: dict[str, str | bytes] = {
        f"{below}/bios_vendor": "American Megatrends & Co <1>",
        f"{below}/sys_vendor": b"Edge\xff\x01 Boxes\t Ltd  \n",
        f"{below}/product_name": "",
        f"{below}/board_asset_tag": " \n",
        f"{below}/chassis_serial": "C-1",
    }
    text = hostxml.sysinfo_xml(sysfs=tree(tmp_path, files))
    root = parse(text)
    assert (root.tag, root.get("type")) == ("sysinfo", "smbios")
    assert [(part.tag, entry.get("name"), entry.text) for part in root for entry in part] == [
        ("bios", "vendor", "American Megatrends & Co <1>"),
        ("system", "manufacturer", "Edge\ufffd Boxes Ltd"),
        ("chassis", "serial", "C-1"),
    ]


def test_a_board_with_a_device_tree(tmp_path: Path) -> None:
    below = "firmware/devicetree/base"
    files = {f"{below}/model": b"Raspberry Pi 4 Model B Rev 1.4\0", f"{below}/serial-number": b"10000000abcdef01\0"}
    assert hostxml.sysinfo_xml(sysfs=tree(tmp_path, files)) == (
        "<sysinfo type='smbios'>\n"
        "  <system>\n"
        "    <entry name='product'>Raspberry Pi 4 Model B Rev 1.4</entry>\n"
        "    <entry name='serial'>10000000abcdef01</entry>\n"
        "  </system>\n"
        "</sysinfo>\n"
    )


def test_firmware_that_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(LibvirtError, match=r"neither SMBIOS .* nor a device tree") as caught:
        hostxml.sysinfo_xml(sysfs=tmp_path)
    assert caught.value.code is Code.NO_SUPPORT


# Markup


def test_markup() -> None:
    assert tag("a", "", leaf("b", "<&>"), leaf("c", ""), tag("d"), name='it\'s "1"', id=3) == (
        "<a name='it&apos;s &quot;1&quot;' id='3'>\n  <b>&lt;&amp;&gt;</b>\n  <d/>\n</a>"
    )
    assert tag("a", "", "") == "<a/>"
    assert leaf("n", 0) == "<n>0</n>"


@pytest.mark.parametrize("text", ["\0\x08", "\ufffe", "\ud800", "a\u2028b", "\x85", "tab\tand\nline"])
def test_whatever_a_text_holds_the_document_is_one(text: str) -> None:
    parse(tag("a", leaf("b", text)) if leaf("b", text) else "<a/>")
