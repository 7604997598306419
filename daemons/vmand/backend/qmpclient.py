"""QEMU's own client of its monitor, without the text that it makes of each message for a log that we do not keep.

Loaded with the first guest: it costs 4 MB that a vmand without guests need not hold.
"""

from typing import Any

from qemu.qmp import QMPClient


class Client(QMPClient):
    """The hooks of the library's base class for whoever looks at messages (AsyncProtocol, "messaging callbacks")."""

    def _cb_inbound(self, msg: Any) -> Any:
        return msg

    def _cb_outbound(self, msg: Any) -> Any:
        return msg
