"""Edgehold's SDK: what the daemons share and what other tools import.

Importing this package imports nothing else: take what you need from its modules, e.g.
``from edgehold.api.vmand import VmandClient``.
"""

__version__ = "0.1.0"
