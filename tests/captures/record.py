"""Records what libvirt's own clients and Debian's libvirtd say to each other: ``python -m tests.captures.record``.

Run by hand, as root, where libvirt-daemon-system, libvirt-clients and python3-libvirt are installed and the small guest
is built. A proxy stands between virsh or libvirt-python and a private libvirtd; each packet that was not seen before
becomes a line of ``libvirt-9.0.jsonl``, as long as its kind has few. It reads packets by itself: what is to be tested
says only which procedures matter.

Most is asked of libvirt's ``test`` driver, whose domains, host and figures are invented. Of the real host's answers
only procedures that tell nothing about it but counters are kept (`_OF_QEMU`), and nothing that is long.
"""

import asyncio
import contextlib
import json
import re
import struct
import sys
from collections.abc import Container
from pathlib import Path

from edgehold.testing.daemons import private_directory
from tests.bench.libvirt import NAME, SYSTEM_PYTHON, Libvirt, private_libvirt
from virtvmand.table import PROCEDURES

FILE = Path(__file__).with_name("libvirt-9.0.jsonl")
LONGEST = 2 * 1024
FEW = 3
"""Of one procedure, from one side, of one kind and status."""
_COMMAND_S = 120.0
_REMOTE = 0x20008086
_HOSTNAME = 59
_OF_QEMU = frozenset(
    {20, 56, 122, 159, 160, 161, 163, 201, 219, 223, 225, 227, 228, 229, 230, 258, 262, 280, 286, 287}
    | {293, 298, 318, 319, 344, 379, 380}
)
_DOMAIN = """<domain type='test'><name>{}</name><memory unit='KiB'>16384</memory><vcpu>2</vcpu>
<os><type arch='i686'>hvm</type></os></domain>"""
# Each session of virsh is one connection, so that what the test driver has done stays until its end.
_VIRSH = (
    ("uri", "version", "hostname", "list --all", "list --title", "dominfo test", "domstate test --reason"),
    ("domid test", "domuuid test", "dumpxml test", "domstats", "vcpuinfo test", "vcpucount test", "dommemstat test"),
    ("domcontrol test", "domjobinfo test", "desc test", "desc test --title --new-desc Title", "desc test --title"),
    ("snapshot-list test", "nodeinfo", "capabilities", "domcapabilities", "sysinfo", "nodecpustats", "nodememstats"),
    ("nodecpumap", "freecell", "freecell --all", "maxvcpus", "net-list --all", "pool-list --all", "nodedev-list"),
    ("secret-list", "iface-list --all", "nwfilter-list", "domiflist test", "domblklist test", "schedinfo test"),
    ("domifaddr test --source agent", "domhostname test", "emulatorpin test", "vcpupin test", "cpu-stats test"),
    ("metadata test urn:one --key one --set '<one/>'", "metadata test urn:one", "metadata test urn:one --remove"),
    ("suspend test", "resume test", "reboot test", "reset test", "setmem test 4194304", "setvcpus test 1"),
    ("autostart test", "autostart --disable test", "domjobabort test", "domtime test --time 1", "inject-nmi test"),
    ("shutdown test --mode acpi", "start test --paused", "destroy test --graceful", "undefine test", "list --all"),
    ("vcpupin test 0 0", "schedinfo test --set weight=5", "shutdown test", "domrename test other", "start other"),
    ("destroy other", "undefine other --managed-save", "domstate nobody", "domid 77", "domiflist test --inactive"),
    ("domifstat test vnet0", "domblkstat test vda", "domblkinfo test vda", "console test"),
    ("qemu-monitor-command test x",),
)  # fmt: skip
# What virsh does not ask, and events: each lambda is one call, whose refusal is as good as its answer.
_PYTHON = """
import sys, threading, time, libvirt
libvirt.registerErrorHandler(lambda *_: None, None)
libvirt.virEventRegisterDefaultImpl()
def turn():
    while True: libvirt.virEventRunDefaultImpl()
threading.Thread(target=turn, daemon=True).start()
c = libvirt.open(sys.argv[1])
def attempt(*calls):
    for call in calls:
        try: call()
        except (libvirt.libvirtError, AttributeError, TypeError): pass
xml = sys.argv[2]
ids = [c.domainEventRegisterAny(None, one, lambda *_: None, None) for one in (0, 1, 15, 16, 22, 23)]
c.registerCloseCallback(lambda *_: None, None)
d = c.lookupByName("test")
ids.append(c.domainEventRegisterAny(d, 0, lambda *_: None, None))
attempt(
    c.getURI, c.getType, c.getVersion, c.getLibVersion, c.isSecure, lambda: c.getMaxVcpus("test"), c.getInfo,
    c.getFreeMemory, lambda: c.getCellsFreeMemory(0, 4), c.getSecurityModel, lambda: c.baselineCPU(["<cpu/>"], 0),
    lambda: c.compareCPU("<cpu><arch>i686</arch><model>pentium</model></cpu>", 0), c.numOfDomains, c.listDomainsID,
    c.numOfDefinedDomains, c.listDefinedDomains, lambda: c.lookupByID(1), lambda: c.lookupByUUID(d.UUID()), d.isActive,
    d.isPersistent, d.isUpdated, d.OSType, d.autostart, d.hasManagedSaveImage, d.messages, d.controlInfo, d.maxMemory,
    d.maxVcpus, d.info, d.vcpus, d.vcpuPinInfo, d.emulatorPinInfo, d.memoryStats, lambda: d.getCPUStats(True),
    lambda: d.getCPUStats(False), c.getAllDomainStats, lambda: c.domainListGetStats([d]), d.jobInfo, d.jobStats,
    lambda: d.metadata(0, None), d.snapshotNum, d.listAllSnapshots, d.schedulerType, d.schedulerParameters,
    lambda: d.interfaceAddresses(0), lambda: d.interfaceAddresses(1), lambda: d.interfaceStats("testnet0"),
    lambda: d.interfaceStats("eth0"), lambda: d.blockStats("vda"), lambda: d.blockInfo("vda"),
    lambda: d.hostname(0), d.suspend, d.resume, lambda: d.reboot(0), lambda: d.reset(0), lambda: d.setMemory(4194304),
    lambda: d.setMemoryFlags(4194304, 1), lambda: d.setVcpus(1), lambda: d.setVcpusFlags(1, 1),
    lambda: d.pinVcpu(0, (True, False)), lambda: d.pinVcpuFlags(0, (True,), 1), lambda: d.setAutostart(1),
    lambda: d.setSchedulerParametersFlags({"weight": 7}, 1), lambda: d.attachDeviceFlags("<disk/>", 1),
    lambda: d.detachDeviceFlags("<disk/>", 1), lambda: d.setMetadata(1, "Title", None, None, 0),
    lambda: d.setMetadata(2, "<one/>", "one", "urn:one", 0), lambda: d.metadata(2, "urn:one"),
    lambda: d.setTime({"seconds": 1, "nseconds": 2}), lambda: d.injectNMI(0), d.abortJob, d.shutdown,
    d.create, d.destroy, lambda: d.createWithFlags(1), lambda: d.createWithFlags(0),
    d.shutdownFlags, lambda: d.createWithFlags(0), lambda: d.destroyFlags(1), lambda: d.rename("renamed", 0),
    lambda: c.defineXML(xml.format("one")), lambda: c.defineXMLFlags(xml.format("two"), 1),
    lambda: c.createXML(xml.format("three"), 0), lambda: c.defineXML("<domain>"), lambda: c.listAllDomains(0),
    lambda: c.listAllDomains(2), c.listDefinedDomains, lambda: c.lookupByName("one").undefine(),
    lambda: c.lookupByName("two").undefineFlags(1), lambda: c.lookupByName("three").undefine(),
    c.listAllNetworks, c.listAllStoragePools, c.listAllInterfaces, c.listAllNWFilters,
    c.listAllSecrets, lambda: c.numOfDevices(None), lambda: c.listDevices(None), lambda: c.numOfDevices("net"),
    c.numOfInterfaces, lambda: c.nodeDeviceEventRegisterAny(None, 0, lambda *_: None, None),
    lambda: c.secretEventRegisterAny(None, 0, lambda *_: None, None), lambda: c.getCPUMap(), lambda: c.getCPUStats(-1),
    lambda: c.getMemoryStats(-1), lambda: d.openConsole(None, c.newStream(), 0),
    lambda: d.openChannel(None, c.newStream(), 0), lambda: c.lookupByName("no such thing"),
    lambda: c.setIdentity({"user-name": "one"}), lambda: c.getDomainCapabilities(None, "i686", None, "test", 0),
    lambda: c.networkLookupByName("default"), lambda: c.listAllDevices(0),
)
for one in ids: attempt(lambda: c.domainEventDeregisterAny(one))
c.setKeepAlive(1, 5)
time.sleep(2.5)
c.unregisterCloseCallback()
c.close()
"""
# The real host: counters, and the console of a guest that prints, takes a key, and is left.
_QEMU = """
import sys, threading, libvirt
libvirt.registerErrorHandler(lambda *_: None, None)
libvirt.virEventRegisterDefaultImpl()
def turn():
    while True: libvirt.virEventRunDefaultImpl()
threading.Thread(target=turn, daemon=True).start()
c = libvirt.open(sys.argv[1])
d = c.lookupByName(sys.argv[2])
def attempt(*calls):
    for call in calls:
        try: call()
        except (libvirt.libvirtError, AttributeError, TypeError): pass
seen = threading.Event()
c.domainEventRegisterAny(d, 0, lambda *_: None, None)
c.domainEventRegisterAny(d, 1, lambda *_: seen.set(), None)
rng = "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"
d.create()
stream = c.newStream()
d.openConsole(None, stream, 1)
stream.send(b"\\n")
stream.recv(64)
stream.finish()
stream = c.newStream()
d.openConsole(None, stream, 1)
stream.abort()
attempt(
    d.suspend, d.resume, c.getSecurityModel, lambda: c.getCPUStats(-1), lambda: c.getCPUStats(0), d.vcpus,
    lambda: c.getMemoryStats(-1), d.controlInfo, lambda: d.getCPUStats(True), lambda: d.getCPUStats(False),
    d.jobStats, d.jobInfo, lambda: c.domainListGetStats([d], 1), lambda: c.domainListGetStats([d]), c.getCPUMap,
    d.vcpuPinInfo, d.emulatorPinInfo, d.memoryStats, d.schedulerType, d.schedulerParameters,
    lambda: d.setSchedulerParametersFlags({"cpu_shares": 1000}, 2), lambda: d.setMetadata(1, "Title", None, None, 0),
    lambda: d.pinVcpuFlags(0, (True,), 2), lambda: d.attachDeviceFlags(rng, 2), lambda: d.detachDeviceFlags(rng, 2),
    c.listAllNWFilters, c.listAllSecrets, lambda: c.secretEventRegisterAny(None, 0, lambda *_: None, None),
    lambda: d.schedulerParametersFlags(2), d.shutdownFlags, lambda: d.reset(0), lambda: seen.wait(20), d.destroy,
)
c.close()
"""
_SERIAL = re.compile(r"<serial type='unix'>.*?</serial>")
_HEADER = struct.Struct(">IIIiiIi")


class Recorder:
    """What was said, each thing once, in the order of procedures."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str, int, int, int], dict[bytes, bytes]] = {}
        self.too_long: list[tuple[int, int]] = []

    def note(self, who: str, packet: bytes) -> None:
        """One packet."""
        _, program, _, procedure, kind, _, status = _HEADER.unpack_from(packet)
        if len(packet) > LONGEST:
            self.too_long.append((procedure, len(packet)))
            return
        known = self._seen.setdefault((program, who, procedure, kind, status), {})
        if len(known) < FEW:
            known.setdefault(packet[28:], packet)

    def keep(self, procedures: Container[int]) -> None:
        """Forget what is of the remote program and not of these procedures."""
        self._seen = {key: one for key, one in self._seen.items() if key[0] != _REMOTE or key[2] in procedures}

    def drop_answers(self, procedure: int) -> None:
        """Forget what the server said there."""
        self._seen = {key: one for key, one in self._seen.items() if (key[1], key[2]) != ("server", procedure)}

    def lines(self, driver: str) -> list[str]:
        """As JSON lines."""
        found = []
        for (program, who, procedure, kind, status), known in self._seen.items():
            about = {"driver": driver, "from": who, "program": program, "procedure": procedure}
            about |= {"kind": kind, "status": status}
            found += [json.dumps(about | {"packet": packet.hex()}) for packet in known.values()]
        return found


async def _pump(who: str, recorder: Recorder, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            head = await reader.readexactly(4)
            packet = head + await reader.readexactly(int.from_bytes(head, "big") - 4)
            recorder.note(who, packet)
            writer.write(packet)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def _run(*argv: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE
    )
    _, said = await asyncio.wait_for(process.communicate(), _COMMAND_S)
    if process.returncode:
        sys.stderr.write(f"{argv[0]}: status {process.returncode}: {said.decode(errors='replace')[-400:]}\n")


async def record(libvirt: Libvirt, directory: Path) -> list[str]:
    """Every session through the proxy; the file's lines.

    Raises:
        TimeoutError: a client hung.
    """
    recorder = Recorder()

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_unix_connection(libvirt.directory / "libvirt-sock")
        await asyncio.gather(_pump("client", recorder, reader, up_writer), _pump("server", recorder, up_reader, writer))

    proxy = directory / "s"
    server = await asyncio.start_unix_server(meet, proxy)
    invented = f"test+unix:///default?socket={proxy}"
    try:
        for commands in _VIRSH:
            await _run("virsh", "-c", invented, "; ".join(commands))
        await _run("virsh", "-k", "1", "-c", invented, "event --all --timeout 3")
        await _run(SYSTEM_PYTHON, "-c", _PYTHON, invented, _DOMAIN)
        recorder.keep(PROCEDURES)
        recorder.drop_answers(_HOSTNAME)
        lines, longer = recorder.lines("test"), recorder.too_long
        recorder = Recorder()
        definition = directory / "domain.xml"
        definition.write_text(_SERIAL.sub("<serial type='pty'/>", libvirt.definition.read_text()))
        await libvirt.virsh("define", str(definition))
        # A terminal's lock file is there; this /run is the daemons' own.
        await _run("nsenter", "--mount", "--target", str(libvirt.pids()[0]), "mkdir", "-p", "/run/lock")
        await _run(SYSTEM_PYTHON, "-c", _QEMU, f"qemu+unix:///system?socket={proxy}", NAME)
        recorder.keep(_OF_QEMU)
        sys.stderr.write(f"too long to keep (procedure, bytes): {longer + recorder.too_long}\n")
        return lines + recorder.lines("qemu")
    finally:
        server.close()
        await server.wait_closed()


async def main() -> None:
    """Write the file."""
    async with private_libvirt() as libvirt:
        with private_directory("eh-rec-") as directory:
            lines = await record(libvirt, directory)
        about = {
            "made by": "python -m tests.captures.record",
            "server": libvirt.version(),
            "what": "packets of libvirt's RPC, each payload once; length, header and payload in hex",
        }
    FILE.write_text("\n".join([json.dumps(about), *lines]) + "\n", encoding="ascii")
    sys.stderr.write(f"{FILE}: {len(lines)} packets, {FILE.stat().st_size} bytes\n")


if __name__ == "__main__":
    asyncio.run(main())
