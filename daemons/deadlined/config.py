"""deadlined's settings: /etc/edgehold/deadlined.toml and its drop-ins."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import msgspec

from edgehold.wire.peer import Access


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What can be set; every key has a default that works."""

    socket: str = "/run/deadlined/api.sock"
    state_dir: str = "/var/lib/deadlined"
    """The journal of what to restore."""
    vmand_socket: str = "/run/vmand/control.sock"
    cycle_ms: Annotated[int, msgspec.Meta(ge=10, le=60_000)] = 500
    """T: every so often budgets are sized anew."""
    history: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 600
    """Samples that are kept for each thread; with more than 64 threads each has its part of 64 times that."""
    max_attachments: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1000
    max_threads: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 5000
    """Threads in all: each keeps a descriptor open."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    access: Access = field(default_factory=Access)
