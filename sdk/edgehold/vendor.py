"""A library and what it needs, from one place: Debian's package of the SDK has its own last in the path (`VENDOR`).

A program may have another version of what ours needs, as of aiohttp's yarl, and not the library itself.
"""

import importlib
import importlib.util
import sys

from edgehold import VENDOR


def prepare(name: str) -> None:
    """Import a library; if it is ours, what it needs is ours too. A plain ``import`` then finds it.

    Raises:
        ImportError: it is nowhere, or the program has imported another version of what it needs before.
    """
    found = importlib.util.find_spec(name)
    if name in sys.modules or found is None or not (found.origin or "").startswith(f"{VENDOR}/"):
        importlib.import_module(name)
        return
    sys.path.insert(0, VENDOR)
    try:
        importlib.import_module(name)
    finally:
        sys.path.remove(VENDOR)
