"""Where the kernel's fields are, from BTF that is made here: every shape of a member, every cut, any damage.

Documentation/bpf/btf.rst has the format.
"""

import errno
import struct
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgehold.errors import UnsupportedError
from edgehold.kernel import native_bpf, taskiter
from edgehold.kernel.native_bpf import RawField, btf_layout
from edgehold.testing.capability import missing, need_command

EXT = Path(__file__).parents[2] / "ext"
INT, PTR, STRUCT, UNION, FWD, TYPEDEF, VOLATILE, CONST, FUNC, DECL_TAG = 1, 2, 4, 5, 7, 8, 9, 10, 12, 17
UNKNOWN = 22


class Btf:
    """A description under construction; every call returns the id of what it added."""

    def __init__(self) -> None:
        self.strings = b"\0"
        self.types = b""
        self.count = 0

    def name(self, text: str) -> int:
        if not text:
            return 0
        at = len(self.strings)
        self.strings += text.encode() + b"\0"
        return at

    def add(self, name: str, kind: int, size: int, *, vlen: int = 0, flag: bool = False, rest: bytes = b"") -> int:
        self.types += struct.pack("<III", self.name(name), kind << 24 | vlen | flag << 31, size) + rest
        self.count += 1
        return self.count

    def number(self, name: str, size: int) -> int:
        return self.add(name, INT, size, rest=struct.pack("<I", 8 * size))

    def group(
        self, name: str, members: Iterable[tuple[str, int, int]], *, kind: int = STRUCT, flag: bool = False
    ) -> int:
        """Members: name, type, and what their offset word holds."""
        rows = list(members)
        rest = b"".join(struct.pack("<III", self.name(one), kind, where) for one, kind, where in rows)
        return self.add(name, kind, 4096, vlen=len(rows), flag=flag, rest=rest)

    def data(self, *, layout: bytes = b"", types: int | None = None) -> bytes:
        """The whole; ``types``: only so many bytes of types, and a header that says so."""
        section = self.types if types is None else self.types[:types]
        header = 32 if layout else 24
        fields = [header, 0, len(section), len(section), len(self.strings)]
        if layout:
            fields += [len(section) + len(self.strings), len(layout)]
        return struct.pack(f"<HBB{len(fields)}I", 0xEB9F, 1, 0, *fields) + section + self.strings + layout


def kernel(
    *,
    without: str = "",
    state: str = "__state",
    pointer: str = "",
    throttled: tuple[int, int] = (3, 1),
    far: int = 0,
    function: str = "bpf_iter_task",
    before: int | None = None,
) -> Btf:
    """A kernel with members of every shape. Offsets are in bits, as the format has them.

    ``pointer`` names a member that is one; ``throttled`` is that bitfield's place and how many bits it has; ``before``
    is a kind of which there is one type before the structures.
    """
    btf = Btf()
    u32, u64 = btf.number("unsigned int", 4), btf.number("unsigned long", 8)
    time = btf.add("u64", TYPEDEF, btf.add("__u64", TYPEDEF, u64))
    held = btf.add("", CONST, btf.add("", VOLATILE, time))
    address = btf.add("", PTR, 0)
    if before is not None:
        btf.add("", before, 0, vlen=3, rest=bytes(4 + 3 * 12))

    def rows(*given: tuple[str, int, int]) -> list[tuple[str, int, int]]:
        kept = [row for row in given if not without or row[0] != without]
        return [(name, address if name and name == pointer else kind, where) for name, kind, where in kept]

    se = btf.group("sched_entity", rows(("load", address, 0), ("sum_exec_runtime", held, 640)))
    info = btf.group("sched_info", rows(("pcount", u64, 0), ("run_delay", time, 64)))
    bits = btf.group("", rows(("runtime", time, 64), ("dl_period", time, 128)), flag=True)
    dl = btf.group(
        "sched_dl_entity",
        rows(
            ("rb", address, 0),
            ("", bits, 192),
            ("dl_throttled", u32, 512 + throttled[0] | throttled[1] << 24),
        ),
        flag=True,
    )
    inner = btf.group("", rows(("prio", u32, 0), ("normal_prio", u32, 32)))
    union = btf.group("", [("stack", u64, 0), ("", inner, 64)], kind=UNION)
    btf.add("task_struct", FWD, 0)
    btf.group(
        "task_struct",
        rows(
            ("thread_info", address, 0),
            (state, u64 if state == "state" else u32, 192),
            ("", union, 1024 + far),
            ("pid", u32, 2048),
            ("start_boottime", time, 2112),
            ("se", se, 4096),
            ("sched_info", info, 8192),
            ("dl", dl, 16384),
        ),
    )
    btf.add(function, FUNC, 0)
    return btf


def test_members_of_every_shape_are_found() -> None:
    found = btf_layout(kernel().data())
    assert found.iterator_id == kernel().count
    assert found.fields == {
        "pid": RawField(256, 4, 0, 32),
        "state": RawField(24, 4, 0, 32),
        "normal_prio": RawField(128 + 8 + 4, 4, 0, 32),  # in a structure without a name, in a union without one
        "start_boottime": RawField(264, 8, 0, 64),
        "sum_exec_runtime": RawField(512 + 80, 8, 0, 64),  # behind two typedefs, const and volatile
        "run_delay": RawField(1024 + 8, 8, 0, 64),
        "pcount": RawField(1024, 8, 0, 64),
        "dl_runtime": RawField(2048 + 24 + 8, 8, 0, 64),
        "dl_period": RawField(2048 + 24 + 16, 8, 0, 64),
        "dl_throttled": RawField(2048 + 64, 1, 3, 1),
    }


def test_an_older_kernel_s_state_is_found() -> None:
    assert btf_layout(kernel(state="state").data()).fields["state"] == RawField(24, 8, 0, 64)


@pytest.mark.parametrize(
    ("field", "path"),
    [
        ("pid", "pid"),
        ("__state", "__state"),
        ("normal_prio", "normal_prio"),
        ("start_boottime", "start_boottime"),
        ("sum_exec_runtime", "se.sum_exec_runtime"),
        ("se", "se.sum_exec_runtime"),
        ("run_delay", "sched_info.run_delay"),
        ("sched_info", "sched_info.run_delay"),
        ("pcount", "sched_info.pcount"),
        ("runtime", "dl.runtime"),
        ("dl_period", "dl.dl_period"),
    ],
)
def test_what_is_missing_or_no_number_is_named(field: str, path: str) -> None:
    for odd in (kernel(without=field), kernel(pointer=field)):
        with pytest.raises(OSError, match=rf"no usable field task_struct\.{path}$") as refused:
            btf_layout(odd.data())
        assert refused.value.errno == errno.ENOTSUP


@pytest.mark.parametrize("throttled", [(7, 2), (3, 12)])
def test_throttled_may_be_missing(throttled: tuple[int, int]) -> None:
    """Also where it is a bitfield of more than one byte."""
    nothing = RawField(0, 0, 0, 0)
    assert btf_layout(kernel(without="dl_throttled").data()).fields["dl_throttled"] == nothing
    assert btf_layout(kernel(throttled=throttled).data()).fields["dl_throttled"] == nothing


def test_a_field_beyond_the_reach_of_an_instruction_is_refused() -> None:
    with pytest.raises(OSError, match="normal_prio"):
        btf_layout(kernel(far=1 << 18).data())


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (kernel(function="bpf_iter_tcp"), "does not have the function bpf_iter_task"),
        (kernel(before=UNKNOWN), f"before a type of an unknown kind, {UNKNOWN}"),
        (Btf(), "does not have the function bpf_iter_task"),
    ],
)
def test_a_kernel_without_iterators_or_with_kinds_that_nobody_knows(odd: Btf, words: str) -> None:
    with pytest.raises(OSError, match=words) as refused:
        btf_layout(odd.data())
    assert refused.value.errno == errno.ENOTSUP


def test_a_kind_that_nobody_knows_is_passed_by_where_its_size_is_told() -> None:
    layout = b"".join(struct.pack("<BBH", 4, 12, 0) if kind == UNKNOWN else bytes(4) for kind in range(UNKNOWN + 1))
    plain, told = btf_layout(kernel().data()), btf_layout(kernel(before=UNKNOWN).data(layout=layout))
    assert told.fields == plain.fields
    assert told.iterator_id == plain.iterator_id + 1


@pytest.mark.parametrize("before", [DECL_TAG, UNKNOWN + 100])
def test_a_damaged_middle_ends_the_search(before: int) -> None:
    with pytest.raises(OSError, match="does not have"):
        btf_layout(kernel(before=before).data())


def test_what_is_not_btf_is_refused() -> None:
    data = kernel().data()
    for odd in (b"", b"\x7fELF" + data[4:], data[:2] + b"\2" + data[3:], data[:4] + b"\7" + data[5:]):
        with pytest.raises(OSError, match="cut, or not BTF") as refused:
            btf_layout(odd)
        assert refused.value.errno == errno.EPROTO


def test_a_cut_at_every_byte_is_noticed() -> None:
    whole = kernel()
    data = whole.data()
    for end in range(len(data)):
        with pytest.raises(OSError, match="cut, or not BTF"):
            btf_layout(data[:end])
    for types in range(len(whole.types)):  # a header that agrees with it
        with pytest.raises(OSError, match="does not have"):
            btf_layout(whole.data(types=types))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=8))
def test_damage_does_no_harm(damage: list[tuple[int, int]]) -> None:
    data = bytearray(kernel().data())
    for at, value in damage:
        data[at % len(data)] = value
    try:
        btf_layout(bytes(data))
    except OSError as error:
        assert error.errno in {errno.EPROTO, errno.ENOTSUP}  # noqa: PT017 - either is fine, anything else is not


# Reads one description from standard input and tries it with each byte changed and at each length, in memory of just
# that size: the sanitizers end the program at the first byte too far.
_HARNESS = """
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "bpf.h"
static void attempt(const unsigned char *data, size_t length) {
    struct eh_layout out;
    char why[64];
    unsigned char *exact = malloc(length ? length : 1);
    memcpy(exact, data, length);
    eh_btf_layout(exact, length, &out, why, sizeof(why));
    free(exact);
}
int main(void) {
    static unsigned char data[1 << 16];
    size_t length = fread(data, 1, sizeof(data), stdin);
    for (size_t at = 0; at <= length; at++) attempt(data, at);
    for (size_t at = 0; at < length; at++) {
        unsigned char kept = data[at];
        for (int bit = 0; bit < 8; bit++) { data[at] = kept ^ 1 << bit; attempt(data, length); }
        data[at] = 0; attempt(data, length);
        data[at] = 255; attempt(data, length);
        data[at] = kept;
    }
    puts("done");
}
"""


def test_nothing_outside_of_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "harness.c").write_text(_HARNESS)
    gcc = [need_command("gcc", "gcc"), "-std=c11", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    built = subprocess.run(
        [*gcc, f"-I{EXT}", str(tmp_path / "harness.c"), str(EXT / "btf.c"), "-o", str(tmp_path / "harness")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "cannot find" in built.stderr and "asan" in built.stderr:
        missing("gcc has no address sanitizer here (Debian package libgcc-12-dev)")
    assert built.returncode == 0, built.stderr
    told = b"".join(struct.pack("<BBH", 4, 12, 0) if kind == UNKNOWN else bytes(4) for kind in range(UNKNOWN + 1))
    for data in (kernel().data(), kernel(before=UNKNOWN).data(layout=told)):
        done = subprocess.run([tmp_path / "harness"], input=data, capture_output=True, timeout=120, check=False)
        assert (done.returncode, done.stdout) == (0, b"done\n"), done.stderr.decode(errors="replace")


@pytest.mark.parametrize("part", ["btf.c", "bpf.c"])
def test_it_compiles_for_arm64(part: str, tmp_path: Path) -> None:
    cross = need_command("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu")
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O2", "-c", f"-I{EXT}"]
    subprocess.run([cross, *flags, str(EXT / part), "-o", str(tmp_path / "part.o")], check=True)


@pytest.mark.parametrize(
    ("bits", "letter"),
    [
        (0, "R"), (1, "S"), (2, "D"), (4, "T"), (8, "t"), (0x10, "X"), (0x20, "Z"), (0x80, "Z"), (0x40, "P"),
        (0x402, "I"), (0x82, "D"), (0x2001, "S"), (0x8000, "D"), (0x1000, "D"), (0x100, "R"),
    ],
)  # fmt: skip
def test_letters_are_those_of_proc(bits: int, letter: str) -> None:
    assert taskiter.state_letter(bits) == letter


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOENT, "CONFIG_DEBUG_INFO_BTF"),
        (errno.EPROTO, "does not know"),
        (errno.ENOTSUP, "no iterators"),
        (errno.ENOSYS, "CONFIG_BPF_SYSCALL"),
        (errno.EACCES, "does not take the program"),
        (errno.EPERM, "."),
    ],
)
def test_a_refusal_keeps_the_kernel_s_words_and_adds_the_cure(
    number: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(_self: native_bpf.Bpf) -> None:
        raise OSError(number, "as\nthe kernel said")

    monkeypatch.setattr(native_bpf.Bpf, "__init__", refused)
    monkeypatch.setattr(taskiter, "_elsewhere", lambda: "")
    with pytest.raises(UnsupportedError, match=rf"as \| the kernel said: .*{words}"):
        taskiter.TaskIterator.open()


def test_privilege_is_told_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    every = (1 << 41) - 1
    assert taskiter._lacking(every) == taskiter._lacking(1 << 21) == taskiter._lacking(3 << 38) == []
    assert taskiter._lacking(0) == ["CAP_BPF", "CAP_PERFMON"]
    assert taskiter._lacking(1 << 39) == ["CAP_PERFMON"]
    monkeypatch.setattr(taskiter, "_effective", lambda: 0)
    assert "lacks CAP_BPF and CAP_PERFMON" in taskiter._denied()


@pytest.mark.parametrize(
    ("text", "words"), [("none [integrity] confidentiality", "lockdown (integrity)"), ("", "lockdown")]
)
def test_lockdown_is_named(text: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if text:
        (tmp_path / "lockdown").write_text(f"{text}\n")
    monkeypatch.setattr(taskiter, "_LOCKDOWN", tmp_path / "lockdown")
    assert taskiter._lockdown() == words


def test_a_pass_pays_where_most_threads_are_held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert taskiter.host_threads() > 1
    assert taskiter.pays(held=1000, threads=1150)
    assert taskiter.pays(held=2, threads=5)
    assert not taskiter.pays(held=10, threads=1150)
    monkeypatch.setattr(taskiter, "PROC", tmp_path)
    assert taskiter.host_threads() == 0
