"""What virsh is refused: what Edgehold can't do, and what a read-only connection may not. See `tests.libvirt.rows`."""

from tests.libvirt.row import NEVER, looking, no, ok

_BOOTED = (ok("define @dir@/lively.xml"), ok("start lively"))

UNSUPPORTED = (
    *_BOOTED,
    *(
        no(line)
        for line in (
            "migrate lively @uri@",
            "migrate --live --p2p lively vman://elsewhere/system",
            "save lively @dir@/saved", "managedsave lively", "restore @dir@/saved", "dump lively @dir@/core",
            "snapshot-create lively", "snapshot-create-as lively one", "snapshot-current lively",
            "checkpoint-create lively", "backup-begin lively",
            "attach-disk lively /nowhere/disk.raw vdb --live", "attach-disk lively /nowhere/disk.raw vdb",
            "attach-disk lively /nowhere/disk.raw vdb --live --config",
            "attach-device lively @dir@/disk.xml --persistent",
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
                    "attach-disk quiet /nowhere/two.raw vdb --config", "attach-device quiet @dir@/disk.xml --config",
                    "detach-device quiet @dir@/disk.xml --config", "update-device quiet @dir@/disk.xml --config",
                    "setmaxmem quiet 192M --config", "setvcpus quiet 2 --config", "domrename quiet still",
                    "dumpxml --security-info quiet",
                )
            ),
        ),
    ),
    ok("list --all", "lively running", "quiet shut off"),
)  # fmt: skip
