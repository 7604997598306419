"""vmand's settings (``/etc/edgehold/vmand.toml``), checked before anything else happens. See docs/vmand.md."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from edgehold.errors import SettingsError
from edgehold.settings import check_absolute
from edgehold.wire.peer import Access

# unix(7): sun_path is 108 bytes with its NUL. The longest path that we make below runtime_dir:
_SUN_PATH = 107
_LONGEST_SOCKET = "/p/9999999999/console.sock"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """What partitions are made of."""

    cores: str = ""
    """Cores for dedicated partitions, as ``1-3,5``. Empty: all that vmand may use. Core 0 never counts."""
    memory_gib: Annotated[float, Meta(ge=0)] = 0.0
    """GiB that all partitions together may take; 0: what the host has available."""
    headroom_mib: Annotated[int, Meta(ge=0)] = 512
    """MiB of the host's available memory that are never given to a partition (QEMU itself needs some)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a caller may ask for at most."""

    partitions: Annotated[int, Meta(ge=1, le=1024)] = 64
    image_mib: Annotated[int, Meta(ge=1)] = 1024
    """Size of a kernel, an initial RAM disk or a device tree."""
    disks: Annotated[int, Meta(ge=0, le=16)] = 8
    """Disks of one guest."""
    nics: Annotated[int, Meta(ge=0, le=8)] = 4
    """Network interfaces of one guest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of it. Directories belong to one vmand alone: what it does not know in them is removed at its start."""

    runtime_dir: str = "/run/vmand"
    state_dir: str = "/var/lib/vmand"
    memory_dir: str = "/dev/shm/vmand"  # noqa: S108 - a directory of our own, 0700, in the tmpfs that every host has
    backend: Literal["auto", "qemu", "vmanager"] = "auto"
    """``auto``: the firmware's partitions where ``vmanager_device`` exists, else QEMU."""
    vmanager_device: str = "/dev/vmanager"
    hugepages: bool = True
    """Take a partition's memory from the host's huge pages where a hugetlbfs is mounted and enough are free."""
    steer: bool = True
    """Move interrupts and unbound workqueues off the cores of deployed dedicated partitions."""
    bridges: tuple[str, ...] = ()
    """Bridges of the host into which guests may be put, or patterns as ``qbr*``. Empty: no guest gets an interface."""
    uid_first: Annotated[int, Meta(ge=0, le=2**32 - 2 - 1024)] = 1_900_000_000
    """First of the uids as which QEMUs run, one a partition; no other use of them on this host. 0: vmand's own user."""
    http: bool = True
    """Serve /healthz and /metrics on ``runtime_dir/http.sock``."""
    accelerator: Literal["auto", "kvm", "tcg"] = "auto"
    launcher: Literal["auto", "systemd", "process"] = "auto"
    slice: str = "vmand.slice"
    qemu: str = "qemu-system-x86_64"
    qemu_aarch64: str = "qemu-system-aarch64"
    qmp_timeout_s: Annotated[float, Meta(gt=0)] = 10.0
    """For each answer of QEMU; one whose vCPU is held by a small reservation takes several 100 ms."""
    start_timeout_s: Annotated[float, Meta(gt=0)] = 30.0
    shutdown_timeout_s: Annotated[float, Meta(ge=0, le=3600)] = 30.0
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    pool: Pool = field(default_factory=Pool)
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)

    @property
    def runtime(self) -> Path:
        return Path(self.runtime_dir)

    @property
    def memory(self) -> Path:
        return Path(self.memory_dir)

    @property
    def journal(self) -> Path:
        """The database of partitions."""
        return Path(self.state_dir) / "vmand.db"

    @property
    def control_socket(self) -> Path:
        return self.runtime / "control.sock"

    @property
    def http_socket(self) -> Path:
        return self.runtime / "http.sock"

    def check(self) -> None:
        """What types alone can't say.

        Raises:
            SettingsError: names the key and the cure.
        """
        for key in ("runtime_dir", "state_dir", "memory_dir"):
            check_absolute(key, getattr(self, key))
        if len({self.runtime_dir, self.state_dir, self.memory_dir}) < 3:
            raise SettingsError("runtime_dir, state_dir and memory_dir: three different directories are needed")
        longest = len((self.runtime_dir.rstrip("/") + _LONGEST_SOCKET).encode())
        if longest > _SUN_PATH:
            raise SettingsError(
                f"runtime_dir: {self.runtime_dir!r} is {longest - _SUN_PATH} bytes too long: "
                f"a unix socket's path below it has at most {_SUN_PATH} bytes; use a shorter directory"
            )
