"""Device tree blobs for tests, good and bad ones: a writer, and a tree of QEMU's arm64 machine ``virt``.

A tree is a dictionary: bytes are a property, a dictionary is a child. Source: devicetree specification v0.4, chapter 5.
"""

import struct
from collections.abc import Iterable, Mapping
from typing import Union

Tree = Mapping[str, Union[bytes, "Tree"]]

_HEADER = struct.Struct(">10I")
_BEGIN_NODE, _END_NODE, _PROP, _END = (struct.pack(">I", token) for token in (1, 2, 3, 9))
_GIC_PHANDLE, _CLOCK_PHANDLE, _GPIO_PHANDLE = 1, 2, 3


def cells(*numbers: int) -> bytes:
    """A property of 32-bit numbers."""
    return struct.pack(f">{len(numbers)}I", *numbers)


def wide(*numbers: int) -> bytes:
    """A property of 64-bit numbers, as addresses and sizes of two cells are."""
    return struct.pack(f">{len(numbers)}Q", *numbers)


def texts(*words: str) -> bytes:
    """A property of texts."""
    return b"".join(word.encode() + b"\0" for word in words)


def changed(tree: Tree, path: str, value: "bytes | Tree | None") -> Tree:
    """The tree with another property or child at the path (``cpus/cpu@0/reg``); None takes it away."""
    first, _, rest = path.partition("/")
    new = dict(tree)
    if rest:
        child = tree.get(first, {})
        if isinstance(child, bytes):
            raise TypeError(f"{first} is a property")
        new[first] = changed(child, rest, value)
    elif value is None:
        del new[first]
    else:
        new[first] = value
    return new


def blob(tree: Tree, *, version: int = 17, reserved: Iterable[tuple[int, int]] = (), slack: int = 0) -> bytes:
    """The flattened tree; ``reserved``: addresses and sizes of memory; ``slack``: bytes of nothing at its end."""
    strings = bytearray()
    structure = _node("", tree, strings) + _END
    entries = b"".join(struct.pack(">QQ", *entry) for entry in (*reserved, (0, 0)))
    structure_at = _HEADER.size + len(entries)
    strings_at = structure_at + len(structure)
    total = strings_at + len(strings) + slack
    # Version 16 has no last field; what stands there is nobody's.
    size = len(structure) if version >= 17 else 0
    header = _HEADER.pack(0xD00DFEED, total, structure_at, strings_at, _HEADER.size, version, 16, 0, len(strings), size)
    return header + entries + structure + bytes(strings) + bytes(slack)


def _node(name: str, tree: Tree, strings: bytearray) -> bytes:
    made = _BEGIN_NODE + _padded(name.encode() + b"\0")
    for key, value in tree.items():
        if isinstance(value, bytes):
            made += _PROP + struct.pack(">II", len(value), _string(key, strings)) + _padded(value)
    for key, value in tree.items():
        if not isinstance(value, bytes):
            made += _node(key, value, strings)
    return made + _END_NODE


def _string(name: str, strings: bytearray) -> int:
    whole = name.encode() + b"\0"
    at = strings.find(whole)
    if at < 0:
        at = len(strings)
        strings += whole
    return at


def _padded(value: bytes) -> bytes:
    return value + bytes(-len(value) % 4)


def virt(*, cores: int, memory_bytes: int) -> Tree:
    """The least of QEMU's ``virt`` with a GICv3 that a Linux guest needs to come up, speak and be powered off."""
    interrupts = (1, 13, 4, 1, 14, 4, 1, 11, 4, 1, 10, 4)  # of each CPU: secure, non-secure, virtual, hypervisor
    cpus: dict[str, bytes | Tree] = {"#address-cells": cells(1), "#size-cells": cells(0)}
    for number in range(cores):
        cpus[f"cpu@{number}"] = {
            "device_type": texts("cpu"),
            "compatible": texts("arm,cortex-a72"),
            "reg": cells(number // 16 << 8 | number % 16),
            "enable-method": texts("psci"),
        }
    return {
        "#address-cells": cells(2),
        "#size-cells": cells(2),
        "compatible": texts("linux,dummy-virt"),
        "interrupt-parent": cells(_GIC_PHANDLE),
        "chosen": {"stdout-path": texts("/pl011@9000000")},
        "cpus": cpus,
        "memory@40000000": {"device_type": texts("memory"), "reg": wide(0x4000_0000, memory_bytes)},
        "psci": {"compatible": texts("arm,psci-1.0", "arm,psci-0.2"), "method": texts("hvc")},
        "timer": {"compatible": texts("arm,armv8-timer"), "interrupts": cells(*interrupts), "always-on": b""},
        "intc@8000000": {
            "compatible": texts("arm,gic-v3"),
            "#interrupt-cells": cells(3),
            "interrupt-controller": b"",
            "phandle": cells(_GIC_PHANDLE),
            "reg": wide(0x0800_0000, 0x1_0000, 0x080A_0000, 0xF6_0000),
        },
        "apb-pclk": {
            "compatible": texts("fixed-clock"),
            "#clock-cells": cells(0),
            "clock-frequency": cells(24_000_000),
            "phandle": cells(_CLOCK_PHANDLE),
        },
        "pl011@9000000": {
            "compatible": texts("arm,pl011", "arm,primecell"),
            "reg": wide(0x0900_0000, 0x1000),
            "interrupts": cells(0, 1, 4),
            "clocks": cells(_CLOCK_PHANDLE, _CLOCK_PHANDLE),
            "clock-names": texts("uartclk", "apb_pclk"),
        },
        "pl061@9030000": {
            "compatible": texts("arm,pl061", "arm,primecell"),
            "reg": wide(0x0903_0000, 0x1000),
            "interrupts": cells(0, 7, 4),
            "clocks": cells(_CLOCK_PHANDLE),
            "clock-names": texts("apb_pclk"),
            "gpio-controller": b"",
            "#gpio-cells": cells(2),
            "phandle": cells(_GPIO_PHANDLE),
        },
        "gpio-keys": {
            "compatible": texts("gpio-keys"),
            "poweroff": {"gpios": cells(_GPIO_PHANDLE, 3, 0), "linux,code": cells(116), "label": texts("power")},
        },
    }
