"""Domain XML of what runs: a definition with what only a running domain has, and XML for partitions that have none.

Only what is known is shown: no pseudo terminal and no port that vmand did not name. Pure: no I/O.
"""

import os

from edgehold.api.vmand import Partition
from virtvmand.definition import Definition, Plan, known_definition
from virtvmand.domedit import edgehold_element, with_options
from virtvmand.xmledit import Edits
from virtvmand.xmltree import MAX_OWN_BYTES, Element, attribute, escaped, parse


def synthesized(partition: Partition) -> Definition:
    """A partition that was made by another tool than libvirt, as a domain.

    What its guest was started with is vmand's alone: no kernel and no disk is shown, so libvirt can't start it.
    """
    arch = partition.arch or os.uname().machine
    vsock = "" if partition.vsock_cid is None else "    <vsock model='virtio'>\n      <cid auto='yes'/>\n    </vsock>\n"
    options = {name: value for name, value in _options(partition).items() if value != "no"}
    return known_definition(
        f"<domain type='vman'>\n  <name>{escaped(partition.name)}</name>\n  <uuid>{escaped(partition.uuid)}</uuid>\n"
        f"  <metadata>\n    {edgehold_element(options)}\n  </metadata>\n"
        f"  <memory unit='KiB'>{partition.memory_bytes // 1024}</memory>\n"
        f"  <currentMemory unit='KiB'>{partition.memory_bytes // 1024}</currentMemory>\n"
        f"  <vcpu placement='static'>{partition.cores}</vcpu>\n"
        f"  <os>\n    <type arch='{attribute(arch)}'>hvm</type>\n  </os>\n"
        "  <clock offset='utc'/>\n"
        "  <on_poweroff>destroy</on_poweroff>\n  <on_reboot>restart</on_reboot>\n  <on_crash>destroy</on_crash>\n"
        "  <devices>\n"
        "    <serial type='pty'>\n      <target port='0'/>\n    </serial>\n"
        "    <console type='pty'>\n      <target type='serial' port='0'/>\n    </console>\n"
        f"{vsock}  </devices>\n</domain>\n"
    )


def domain_xml(definition: Definition, partition: Partition, *, active: bool, inactive_view: bool) -> str:
    """What a client is shown of a domain: its text as it was written.

    Of a running one, unless its definition is asked for (``inactive_view``), with its id, the console's alias, the taps
    of its network interfaces and its address for vsock(7).
    """
    text, live = definition.xml, active and not inactive_view
    # A running guest's partition is what it was started as; its definition may already be another for the next start.
    if live and (changed := _changed(definition.plan, partition)):
        text = with_options(text, changed)
    document = parse(text, most=MAX_OWN_BYTES)
    edits, root = Edits(document), document.root
    if live:
        edits.set_attribute(root, "id", str(partition.id))
        _show_devices(edits, root, partition)
    elif "id" in root.attributes:
        edits.set_attribute(root, "id", None)  # it was in a live document that a client defined again
    else:
        return text
    return edits.text()


def _options(one: Plan | Partition) -> dict[str, str]:
    return {"mode": one.mode.value, "secure": "yes" if one.secure else "no", "strict": "yes" if one.strict else "no"}


def _changed(plan: Plan, partition: Partition) -> dict[str, str]:
    """What somebody changed through vmand itself since the domain was defined."""
    was = _options(plan)
    return {name: now for name, now in _options(partition).items() if was[name] != now}


def _show_devices(edits: Edits, root: Element, partition: Partition) -> None:
    devices = root.child("devices")
    if devices is None:
        return
    for element in (*devices.all("serial"), *devices.all("console")):
        target = element.child("target")
        virtio = target is not None and target.attributes.get("type") == "virtio"
        if element.child("alias") is None:
            edits.insert_last(element, f"<alias name='{'console0' if virtio else 'serial0'}'/>")
    nics = devices.all("interface")
    # Of another number than the guest has it is not known which is which: another tool started it.
    for element, tap in zip(nics, partition.taps if len(nics) == len(partition.taps) else (), strict=False):
        target = element.child("target")
        if target is None:
            edits.insert_last(element, f"<target dev='{attribute(tap)}'/>")
        else:
            edits.set_attribute(target, "dev", tap)
    cid = devices.find("vsock", "cid")
    if cid is not None and partition.vsock_cid is not None:
        edits.set_attribute(cid, "address", str(partition.vsock_cid))
