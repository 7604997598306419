"""What a firmware below /dev/vmanager gives to partitions, as findings: facts in, findings out. Pure."""

from collections.abc import Collection

from edgehold.api.vmand import Check
from edgehold.errors import EdgeholdError
from edgehold.kernel.vmanager import Cap, Info
from vmand.model import MIB
from vmand.placement import as_list

_KINDS = {0: "a model of a firmware", 1: "a firmware by SMC"}


def silent(device: str, error: EdgeholdError) -> Check:
    """A firmware that does not answer."""
    return Check(
        subject="firmware",
        level="missing",
        found=f"{device}: {error}",
        cure="look at the driver's words in the kernel's log; guests that run are not touched by that",
    )


def checks(info: Info, *, device: str, pool: Collection[int], arch: str) -> list[Check]:
    """Everything, the firmware itself first."""
    major, minor = info.firmware
    kind = _KINDS.get(info.backend, "a hypervisor")
    version = f" {major}.{minor}" if info.firmware != (0, 0) else ""
    return [
        Check(
            subject="firmware",
            level="good",
            found=f"{device}: {kind}{version}, ABI {info.abi}, {info.num_partitions} of {info.max_partitions} "
            f"partitions; it runs kernels for {arch}",
        ),
        _cores(info, pool),
        _memory(info),
        *(_cap(info, *one) for one in _CAPS if one[0] is not Cap.GENDTB or arch == "aarch64"),
    ]


def _cores(info: Info, pool: Collection[int]) -> Check:
    if not pool:
        return Check(
            subject="cores",
            level="missing",
            found=f"none is left for vmand; the firmware may give {as_list(info.cpus) or 'none'}",
            cure="destroy partitions that are not vmand's and restart it, or name others in pool.cores",
        )
    return Check(subject="cores", level="good", found=f"isolated by the firmware: {as_list(pool)}")


def _memory(info: Info) -> Check:
    free, total = info.memory_free // MIB, info.memory_total // MIB
    return Check(
        subject="memory",
        level="good" if free else "missing",
        found=f"{free} of {total} MiB of the firmware's own are free, in pieces of {info.memory_align // MIB} MiB",
        cure="" if free else "destroy a partition, or give the firmware more at boot",
    )


_CAPS = (
    (Cap.KEEP, "restart", "guests outlive vmand", "every restart of vmand ends all guests and partitions"),
    (Cap.EVENTS, "exit-events", "the firmware tells when a guest ends", "guests are looked at once a second"),
    (Cap.SHUTDOWN, "shutdown", "guests are asked to power off", "shutdown needs force, or powering off from inside"),
    (Cap.SUSPEND, "suspend", "a guest's CPUs can be stopped", "suspend is refused"),
    (Cap.REBOOT, "reboot", "a guest can be loaded again", "reboot is refused; shut down and deploy again"),
    (Cap.SECURE, "secure", "partitions can be in the secure world", "secure partitions are refused"),
    (Cap.CLEARS, "clearing", "the firmware clears memory itself", "vmand asks for it before memory is given again"),
    (Cap.GENDTB, "device-tree", "the firmware makes one where none is given", "an arm64 guest needs a dtb of yours"),
)


def _cap(info: Info, cap: Cap, subject: str, there: str, lacking: str) -> Check:
    if cap in info.caps:
        return Check(subject=subject, level="good", found=there)
    return Check(subject=subject, level="good" if cap is Cap.CLEARS else "limited", found=f"it can't: {lacking}")
