"""virtvmand's settings (``/etc/edgehold/virtvmand.toml``), checked before all else. See docs/libvirt.md."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from edgehold.api.vmand import DEFAULT_SOCKET, Mode
from edgehold.errors import SettingsError
from edgehold.settings import check_absolute
from edgehold.wire.peer import Access

# unix(7): sun_path is 108 bytes with its NUL.
_SUN_PATH = 107
_LONGEST_SOCKET = "/virtvmand-sock-ro"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of it."""

    socket_dir: str = "/run/libvirt"
    """Where libvirt's clients look for ``virtvmand-sock`` and ``virtvmand-sock-ro``."""
    runtime_dir: str = "/run/virtvmand"
    """Ours: /healthz and /metrics, and which autostarts were done since the host's boot."""
    vmand_socket: str = str(DEFAULT_SOCKET)
    mode: Mode = Mode.DEDICATED
    """How the vCPUs of a domain use cores whose definition does not say it (Nova's never do)."""
    shutdown_timeout_s: Annotated[float, Meta(ge=1, le=3600)] = 300.0
    """For how long a guest that was asked to power off is asked again; it is never ended by force."""
    reboot_timeout_s: Annotated[float, Meta(ge=0, le=3600)] = 30.0
    """For how long a guest is asked to power off for a reboot before it is reset by force."""
    http: bool = True
    """Serve /healthz and /metrics on ``runtime_dir/http.sock``."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    access: Access = field(default_factory=Access)

    @property
    def runtime(self) -> Path:
        return Path(self.runtime_dir)

    @property
    def sockets(self) -> Path:
        return Path(self.socket_dir)

    @property
    def http_socket(self) -> Path:
        return self.runtime / "http.sock"

    def check(self) -> None:
        """What types alone can't say.

        Raises:
            SettingsError: names the key and the cure.
        """
        for key in ("socket_dir", "runtime_dir", "vmand_socket"):
            value = getattr(self, key)
            check_absolute(key, value)
            longest = value.rstrip("/") + ("" if key == "vmand_socket" else _LONGEST_SOCKET)
            if len(longest.encode()) > _SUN_PATH:
                raise SettingsError(f"{key}: {value!r} is too long: a unix socket's path has at most {_SUN_PATH} bytes")
