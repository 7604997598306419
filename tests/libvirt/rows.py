"""What virsh is asked, and what it must say: the whole of virsh that virtvmand serves, and what it refuses.

A section is a dialogue with an empty vmand; its rows follow on each other. ``says`` are patterns (re.MULTILINE) that
must all be found in what virsh printed, stdout and stderr, with one space for many; ``lacks`` must not.
``@dir@`` is where the definitions are; what ``keep`` names stands between two ``@`` in later rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

QUIET = "11111111-2222-4333-8444-555555555555"
LIVELY = "22222222-2222-4333-8444-555555555555"
NEVER = "99999999-2222-4333-8444-555555555555"
HUNG_UP = r"End of file|Cannot recv|Broken pipe|keepalive|socket is closed|cause is unknown|^error: internal error"
"""What is never an answer."""


@dataclass(frozen=True, slots=True)
class Row:
    """One command line."""

    line: str
    says: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    status: int | None = 0
    """None: versions of virsh differ in it."""
    keep: str = ""
    """What it prints stands for this name in later rows."""
    until: bool = False
    """It is asked again until it says so."""
    ups: tuple[str, int] = ("", 0)
    """Before it, the guest of this name must have said so many times that it is up."""
    read_only: bool = False


def ok(line: str, *says: str, lacks: tuple[str, ...] = (), keep: str = "", ups: tuple[str, int] = ("", 0)) -> Row:
    """Does what it is asked for."""
    return Row(line, says, lacks, keep=keep, ups=ups)


def no(line: str, *says: str) -> Row:
    """Is refused, with a text that says why."""
    return Row(line, (r"^error: .{12,}", *says), (HUNG_UP,), status=1)


def none(line: str) -> Row:
    """There is none: newer versions of virsh print nothing instead of our error."""
    return Row(line, (r"\A(error: metadata not found.*)?\Z",), status=None)


def soon(line: str, *says: str, lacks: tuple[str, ...] = ()) -> Row:
    """Does, after a while."""
    return Row(line, says, lacks, until=True)


def looking(row: Row) -> Row:
    """The same on a read-only connection."""
    return Row(row.line, row.says, row.lacks, row.status, read_only=True)


HOST = (
    ok("version", r"^Using API: \S+ \d+\.\d+\.\d+$", r"^Running hypervisor: \S+ \d+\.\d+\.\d+$"),
    ok("uri", r"^vman:///system"),
    ok("hostname", r"^[A-Za-z0-9][\w.-]*$"),
    ok("nodeinfo", r"^CPU model: \S+", r"^CPU\(s\): [1-9]\d*$", r"^Memory size: [1-9]\d+ KiB$"),
    ok("capabilities", r"<arch>\w+</arch>", r"<os_type>hvm</os_type>", r"<arch name='x86_64'>", "<domain type='qemu'"),
    ok("nodecpustats", r"^user: \d+$", r"^system: \d+$", r"^idle: \d+$"),
    ok("nodecpustats 0", r"^idle: \d+$"),
    no("nodecpustats 4095", "4095"),
    ok("nodememstats", r"^total ?: [1-9]\d* KiB$", r"^free ?: \d+ KiB$"),
    ok("nodecpumap", r"^CPUs present: [1-9]", r"^CPUs online: [1-9]", r"^CPU map: y"),
    ok("nodecpumap --pretty", r"^CPU map: 0"),
    ok("freecell", r"^Total: [1-9]\d* KiB$"),
    ok("freecell --all", r"^0: \d+ KiB$", r"^Total: [1-9]\d* KiB$"),
    ok("maxvcpus", r"^[1-9]\d*$"),
    ok("maxvcpus --type qemu", r"^[1-9]\d*$"),
    Row("sysinfo", (r"<sysinfo type='smbios'>|^error: .*firmware",), (HUNG_UP,), status=None),  # as the host has it
    Row("event --all --timeout 1", ("^event loop timed out$", "^events received: 0$"), status=1),
    *(
        ok(f"{kind}-list{more}", "^Name", lacks=("error",))
        for kind, more in (("net", " --all"), ("pool", " --all"), ("iface", " --all"))
    ),
    ok("nwfilter-list", "^UUID Name", lacks=("error",)),
    ok("secret-list", "^UUID Usage", lacks=("error",)),
    ok("nodedev-list", lacks=(".",)),
    ok("domstats", lacks=("Domain",)),
    ok("list --all", "^Id Name State"),
    no("nodesuspend mem 60"),
    no("node-memory-tune"),
    no("net-info default"),
    no("vol-list default"),
    no("pool-info default"),
    no("nodedev-dumpxml computer"),
)

HOST_TOO = (
    ok("domcapabilities", "<domainCapabilities>", "<loader supported='no'", "<tpm supported='no'", "<features>"),
    ok("domcapabilities --virttype qemu --arch x86_64", "<arch>x86_64</arch>", "<domain>qemu</domain>"),
    no("domcapabilities --arch sparc", "sparc"),
)
"""libvirt's client allows them only where one may change something."""

LOOK_ONLY = (
    ok("list", lacks=("quiet",)),
    ok("list --all", "^- quiet shut off$"),
    ok("list --inactive", "^- quiet shut off$"),
    ok("list --all --name", "^quiet$"),
    ok("list --all --uuid", f"^{QUIET}$"),
    ok("list --all --title", "^- quiet shut off"),
    ok("list --all --state-shutoff", "quiet"),
    ok("list --all --state-running", lacks=("quiet",)),
    ok("list --all --state-paused", lacks=("quiet",)),
    ok("list --all --state-other", lacks=("quiet",)),
    ok("list --all --persistent", "quiet"),
    ok("list --all --transient", lacks=("quiet",)),
    ok("list --all --autostart", lacks=("quiet",)),
    ok("list --all --no-autostart", "quiet"),
    ok("list --all --with-managed-save", lacks=("quiet",)),
    ok("list --all --without-managed-save", "quiet"),
    ok("list --all --with-snapshot", lacks=("quiet",)),
    ok("list --all --without-snapshot", "quiet"),
    ok("domid quiet", "^-$"),
    ok("domuuid quiet", f"^{QUIET}$"),
    ok(f"domname {QUIET}", "^quiet$"),
    ok("domstate --reason quiet", r"^shut off \(unknown\)$"),
    ok(
        "dominfo quiet",
        "^Id: -$", "^Name: quiet$", f"^UUID: {QUIET}$", "^OS Type: hvm$", "^State: shut off$", r"^CPU\(s\): 1$",
        "^Max memory: 131072 KiB$", "^Used memory: 131072 KiB$", "^Persistent: yes$", "^Autostart: disable$",
        "^Managed save: no$",
    ),
    ok(
        "dumpxml quiet",
        "<domain type='vman'>", f"<uuid>{QUIET}</uuid>", "mode='shared'", "<mac address='52:54:00:00:00:01'/>",
    ),
    ok("dumpxml --inactive quiet", "<name>quiet</name>"),
    ok("dumpxml quiet --xpath //name", "^<name>quiet</name>$"),
    ok("domiflist quiet", "^- bridge nowhere virtio 52:54:00:00:00:01$"),
    ok("domblklist quiet", "^vda /nowhere/disk.raw$"),
    ok("domblklist --details quiet", "^file disk vda /nowhere/disk.raw$"),
    ok("vcpucount quiet", "^maximum config 1$", "^current config 1$"),
    ok("vcpucount quiet --maximum --config", "^1$"),
    no("vcpucount quiet --live"),
    ok("vcpuinfo quiet", "^VCPU: 0$", "^State: N/A$", "^CPU Affinity: y"),
    ok("vcpupin quiet", r"^0 0"),
    no("domcontrol quiet", "not running"),
    no("dommemstat quiet", "not running"),
    no("domid nobody", "nobody"),
    no(f"domname {NEVER}", NEVER),
    no("domname 4711", "4711"),
    ok("desc quiet", "^No description for domain: quiet$"),
    ok("desc --title quiet", "^No title for domain: quiet$"),
    none("metadata quiet urn:none"),
    ok("metadata quiet urn:edgehold:partition:1", "mode=[\"']shared[\"']"),
    ok("snapshot-list quiet", "^Name Creation Time State$", lacks=("error",)),
    ok("domstats quiet", "^Domain: 'quiet'$", "^state.state=5$", "^balloon.maximum=131072$", "^vcpu.maximum=1$"),
    ok("domstats --state quiet", "^state.reason=0$", lacks=("vcpu",)),
    ok("domstats --list-inactive", "^Domain: 'quiet'$"),
    ok("domstats --list-active", lacks=("quiet",)),
)  # fmt: skip

LOOK = (
    ok("define @dir@/quiet.xml", "^Domain 'quiet' defined from @dir@/quiet.xml$"),
    *LOOK_ONLY,
    *map(looking, LOOK_ONLY),
)

CHANGE = (
    ok("define --validate @dir@/quiet.xml", "^Domain 'quiet' defined from"),
    ok("define @dir@/quiet.xml", "^Domain 'quiet' defined from"),
    ok("list --all --uuid", f"^{QUIET}$", lacks=(r"\n.",)),
    ok("define @dir@/other.xml", "^Domain 'other' defined from"),
    ok("define @dir@/kvm.xml", "^Domain 'also' defined from"),
    ok("define @dir@/qemu.xml", "^Domain 'and' defined from"),
    ok("desc quiet --config --new-desc 'two words'", "^Domain description updated successfully$"),
    ok("desc quiet", "^two words$"),
    ok("desc quiet --title --new-desc 'A title'", "^Domain title updated successfully$"),
    ok("desc quiet --title", "^A title$"),
    ok("list --all --title", "^- quiet shut off A title$"),
    ok("dumpxml quiet", "<title>A title</title>", "<description>two words</description>"),
    ok("desc quiet --title --new-desc ''", "^Domain title updated successfully$"),
    ok("desc quiet --title", "^No title for domain: quiet$"),
    no("desc quiet --live --new-desc no", "not running"),
    ok("metadata quiet urn:of:a:test --key its --set '<a b=\"c\"/>'", "^Metadata modified$"),
    ok("metadata quiet urn:of:a:test", "^<a b=[\"']c[\"']/>$"),
    ok("dumpxml quiet", "xmlns:its=[\"']urn:of:a:test[\"']", "mode='shared'"),
    ok("metadata quiet urn:of:a:test --remove", "^Metadata removed$"),
    none("metadata quiet urn:of:a:test"),
    ok("edit other", "^Domain 'other' XML configuration edited.$"),
    ok("dumpxml other", "<title>edited</title>"),
    ok("edit other", "^Domain 'other' XML configuration not changed.$"),
    ok("setmaxmem quiet 192M --config"),
    ok("setmem quiet 192M --config"),
    ok("dominfo quiet", "^Max memory: 196608 KiB$", "^Used memory: 196608 KiB$"),
    ok("setvcpus quiet 2 --config --maximum"),
    ok("setvcpus quiet 2 --config"),
    ok("vcpucount quiet", "^maximum config 2$", "^current config 2$"),
    no("setvcpus quiet 0 --config"),
    no("setmem quiet 200M --live", "not running"),
    ok("autostart quiet", "^Domain 'quiet' marked as autostarted$"),
    ok("dominfo quiet", "^Autostart: enable$"),
    ok("list --all --autostart", "quiet", lacks=("other",)),
    ok("autostart --disable quiet", "^Domain 'quiet' unmarked as autostarted$"),
    ok("dominfo quiet", "^Autostart: disable$"),
    ok("domrename quiet still", "^Domain successfully renamed$"),
    ok("domname 11111111-2222-4333-8444-555555555555", "^still$"),
    no("domrename still other", "other"),
    ok("dumpxml still", "<name>still</name>"),
    ok("domrename still quiet", "^Domain successfully renamed$"),
    no("start quiet", "kernel"),
    ok("domstate quiet", "^shut off$"),
    no("define @dir@/same-name.xml", "quiet"),
    no("define @dir@/other.xml", "other"),
    no("define @dir@/same-uuid.xml", QUIET),
    no("define @dir@/broken.xml"),
    no("define @dir@/graphics.xml", "graphics"),
    no("create @dir@/graphics.xml", "graphics"),
    no("suspend quiet", "not running"),
    no("resume quiet", "not running"),
    no("shutdown quiet", "not running"),
    no("reboot quiet", "not running"),
    no("reset quiet", "not running"),
    no("destroy quiet", "not running"),
    ok("managedsave-remove quiet", "no manage save image"),
    ok(f"undefine {QUIET}", "^Domain '11111111-2222-4333-8444-555555555555' has been undefined$"),
    ok("undefine --managed-save --nvram other", "^Domain 'other' has been undefined$"),
    ok("undefine also", "has been undefined$"),
    ok("undefine and", "has been undefined$"),
    no("undefine quiet", "quiet"),
    ok("list --all", lacks=("quiet", "other", "also")),
)

LIVE = (
    ok("define @dir@/lively.xml", "^Domain 'lively' defined from"),
    ok("start lively", "^Domain 'lively' started$"),
    no("start lively", "already (running|active)"),
    ok("domid lively", r"^\d+$", keep="id"),
    ok("domuuid lively", f"^{LIVELY}$"),
    ok("domname @id@", "^lively$"),
    ok(f"domname {LIVELY}", "^lively$"),
    ok("domstate @id@", "^running$"),
    ok("domstate --reason lively", r"^running \(booted\)$"),
    ok("list", "^@id@ lively running$"),
    ok("list --id", "^@id@$"),
    ok("list --state-running", "lively"),
    ok("list --inactive", lacks=("lively",)),
    ok(
        "dominfo lively",
        "^Id: @id@$", f"^UUID: {LIVELY}$", "^State: running$", r"^CPU time: \d+\.\d+s$", "^Max memory: 131072 KiB$",
        "^Used memory: 131072 KiB$", "^Persistent: yes$",
    ),
    ok("dumpxml lively", "<domain type='vman' id='@id@'", f"<uuid>{LIVELY}</uuid>"),
    ok("dumpxml --inactive lively", "<domain type='vman'>"),
    ok("domiflist lively", "^Interface Type", lacks=("bridge",)),
    ok("domblklist lively", "^Target Source", lacks=("vda",)),
    ok(
        "vcpuinfo lively",
        "^VCPU: 0$", r"^CPU: \d+$", "^State: running$", r"^CPU time: \d+\.\d+s$", r"^CPU Affinity: [y-]+$",
    ),
    ok("vcpuinfo --pretty lively", r"^CPU Affinity: 0"),
    ok("vcpucount lively", "^maximum config 1$", "^maximum live 1$", "^current config 1$", "^current live 1$"),
    ok("dommemstat lively", "^actual 131072$", r"^rss [1-9]\d+$"),
    ok("domcontrol lively", "^ok$"),
    ok("domjobinfo lively", "^Job type: None$"),
    ok(
        "domstats lively",
        "^state.state=1$", r"^cpu.time=[1-9]\d+$", "^balloon.current=131072$", "^vcpu.current=1$", "^vcpu.0.state=1$",
    ),
    ok("domstats --list-active --state", "^Domain: 'lively'$"),
    ok("suspend lively", "^Domain 'lively' suspended$"),
    ok("domstate --reason lively", r"^paused \(user\)$"),
    ok("list", "^@id@ lively paused$"),
    ok("list --state-paused", "lively"),
    ok("suspend @id@", "^Domain '@id@' suspended$"),  # as libvirt's own drivers
    ok("resume lively", "^Domain 'lively' resumed$"),
    ok("domstate --reason lively", r"^running \(unpaused\)$"),
    no("resume lively", "already running"),
    ok("desc lively --config --new-desc 'next time'", "^Domain description updated successfully$"),
    ok("desc lively --live --new-desc 'this time'", "^Domain description updated successfully$"),
    ok("desc lively", "^this time$"),
    ok("desc lively --config", "^next time$"),
    ok("dumpxml lively --inactive", "<description>next time</description>"),
    ok("dumpxml lively", "<description>this time</description>"),
    ok("reset lively", "^Domain 'lively' was reset$", ups=("lively", 1)),
    ok("domstate lively", "^running$", ups=("lively", 2)),
    ok("reboot lively", "^Domain 'lively' is being rebooted$"),
    ok("list", "lively", ups=("lively", 3)),
    soon("domstate lively", "^running$"),
    ok("shutdown --mode acpi lively", "^Domain 'lively' is being shutdown$"),
    soon("domstate --reason lively", r"^shut off \(shutdown\)$"),
    ok("desc lively", "^next time$"),
    ok("domid lively", "^-$"),
    ok("start --paused lively", "^Domain 'lively' started$"),
    ok("domstate lively", "^paused$"),
    ok("resume lively", "^Domain 'lively' resumed$"),
    ok("destroy lively", "^Domain 'lively' destroyed$"),
    ok("domstate --reason lively", r"^shut off \(destroyed\)$"),
    ok("start lively", "^Domain 'lively' started$"),
    ok("destroy --graceful lively", "^Domain 'lively' destroyed$"),
    ok("domstate lively", "^shut off$"),
    ok("start lively", "^Domain 'lively' started$"),
    no("domrename lively other"),
    ok("undefine lively", "^Domain 'lively' has been undefined$"),
    ok("list --transient", "lively"),
    ok("dominfo lively", "^Persistent: no$", "^State: running$"),
    no("undefine lively", "transient"),
    ok("define @dir@/lively.xml", "^Domain 'lively' defined from"),
    ok("list --persistent", "lively"),
    ok("undefine lively", "has been undefined$"),
    ok("destroy lively", "^Domain 'lively' destroyed$"),
    ok("list --all", lacks=("lively",)),
)  # fmt: skip

TRANSIENT = (
    ok("create @dir@/brief.xml", "^Domain 'brief' created from @dir@/brief.xml$"),
    no("create @dir@/brief.xml", "brief"),
    ok("domstate --reason brief", r"^running \(booted\)$"),
    ok("dominfo brief", "^Persistent: no$"),
    ok("list --transient", "brief"),
    ok("list --persistent", lacks=("brief",)),
    no("autostart brief", "transient"),
    no("undefine brief", "transient"),
    no("desc brief --config --new-desc no", "transient"),
    ok("destroy brief", "^Domain 'brief' destroyed$"),
    ok("list --all", lacks=("brief",)),
    ok("create --paused @dir@/brief.xml", "^Domain 'brief' created from"),
    ok("domstate --reason brief", r"^paused \("),
    ok("resume brief", "^Domain 'brief' resumed$"),
    ok("shutdown brief", "^Domain 'brief' is being shutdown$", ups=("brief", 1)),
    soon("list --all", lacks=("brief",)),
    no("domstate brief", "brief"),
)

_BOOTED = (ok("define @dir@/lively.xml"), ok("start lively"))

UNSUPPORTED = (
    *_BOOTED,
    *(
        no(line)
        for line in (
            "migrate lively qemu+unix:///system?socket=/nowhere",
            "migrate --live --p2p lively vman://elsewhere/system",
            "save lively @dir@/saved", "managedsave lively", "restore @dir@/saved", "dump lively @dir@/core",
            "snapshot-create lively", "snapshot-create-as lively one", "snapshot-current lively",
            "checkpoint-create lively", "backup-begin lively",
            "attach-disk lively /nowhere/disk.raw vdb --live", "attach-disk lively /nowhere/disk.raw vdb --config",
            "attach-interface lively bridge nowhere --live", "attach-device lively @dir@/disk.xml",
            "detach-device lively @dir@/disk.xml", "detach-disk lively vdb", "update-device lively @dir@/disk.xml",
            "detach-interface lively bridge", "change-media lively vda --eject",
            "blockcopy lively vda /nowhere/copy", "blockcommit lively vda", "blockpull lively vda",
            "blockresize lively vda 1G", "blkdeviotune lively vda", "domblkinfo lively vda", "domifstat lively nowhere",
            "screenshot lively @dir@/shot", "send-key lively 30", "inject-nmi lively", "domdisplay lively",
            "vncdisplay lively", "send-process-signal lively 1 term",
            "qemu-monitor-command lively --hmp info", "qemu-agent-command lively {}", "qemu-attach 1",
            "set-user-password lively root x", "domfsfreeze lively", "domfsthaw lively", "domfsinfo lively",
            "domfstrim lively", "domtime lively", "domtime lively --now", "domhostname lively",
            "domifaddr lively", "guestinfo lively", "guestvcpus lively",
            "setmem lively 64M --live", "setmaxmem lively 1G --live", "setvcpus lively 2 --live",
            "vcpupin lively 0 0", "emulatorpin lively 0", "numatune lively --mode strict",
            "memtune lively --hard-limit 1",
            "iothreadadd lively 1", "iothreadinfo lively", "setvcpu lively 0 --enable",
            "schedinfo lively --set cpu_shares=10", "perf lively --enable cmt",
            "dompmsuspend lively mem", "dompmwakeup lively", "domjobabort lively",
            "set-lifecycle-action lively poweroff restart", "domif-setlink lively nowhere down",
            "pool-define-as p dir --target /nowhere", "pool-create-as p dir --target /nowhere",
            "vol-create-as p v 1M", "net-create @dir@/disk.xml", "net-start default",
            "nodedev-create @dir@/disk.xml", "iface-start nowhere", "secret-undefine " + NEVER,
            "nwfilter-undefine none", "shutdown --mode agent lively", "reboot --mode initctl lively",
        )
    ),
    ok("domstate lively", "^running$"),
)  # fmt: skip

READ_ONLY = (
    *_BOOTED,
    ok("define @dir@/quiet.xml"),
    *map(
        looking,
        (
            ok("list --all", "lively", "quiet"),
            ok("domstate lively", "^running$"),
            ok("dumpxml lively", "<name>lively</name>"),
            *(
                no(line, "read only|forbidden")
                for line in (
                    "define @dir@/quiet.xml", "define --validate @dir@/quiet.xml", "create @dir@/brief.xml",
                    "start quiet", "start --paused quiet",
                    "suspend lively", "resume lively", "reboot lively", "reset lively", "shutdown lively",
                    "shutdown --mode acpi lively", "destroy lively", "destroy --graceful lively", "undefine quiet",
                    "autostart quiet", "autostart --disable quiet", "desc quiet --config --new-desc no",
                    "metadata quiet urn:of:a:test --key its --set <a/>", "setmem quiet 192M --config",
                    "setmaxmem quiet 192M --config", "setvcpus quiet 2 --config", "domrename quiet still",
                    "dumpxml --security-info quiet",
                )
            ),
        ),
    ),
    ok("list --all", "lively running", "quiet shut off"),
)  # fmt: skip

SECTIONS: Mapping[str, tuple[Row, ...]] = {
    "host": (*HOST, *HOST_TOO),
    "host-read-only": tuple(map(looking, HOST)),
    "look": LOOK,
    "change": CHANGE,
    "live": LIVE,
    "transient": TRANSIENT,
    "unsupported": UNSUPPORTED,
    "read-only": READ_ONLY,
}
