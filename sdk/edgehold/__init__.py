"""Edgehold's SDK: what the daemons share and what other tools import.

Importing this package imports nothing else: take what you need from its modules, e.g.
``from edgehold.api.vmand import VmandClient``.
"""

import sys

__version__ = "0.1.0"

VENDOR = "/usr/lib/edgehold/vendor"
"""Where Debian's package of the SDK has what it needs."""

if __file__.startswith("/usr/lib/python3/"):
    # Last: what the importing program brings comes first.
    sys.path.append(VENDOR)
