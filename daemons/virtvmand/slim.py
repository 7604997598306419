"""Imported before everything else in the daemon: asyncio is to leave out TLS, of which unix sockets have no need.

libssl and libcrypto are some 4 MB of a daemon that is to be small. Whoever has asyncio already (a test) keeps it all.
"""

import sys

_ABSENT = "asyncio" not in sys.modules and "ssl" not in sys.modules
if _ABSENT:
    sys.modules["ssl"] = None  # type: ignore[assignment] # the import system's way to say that there is none


def undo() -> None:
    """Let what is imported from now on have it."""
    if _ABSENT and sys.modules.get("ssl", sys) is None:
        del sys.modules["ssl"]
