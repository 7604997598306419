"""Calls that clients make and partitions can't answer, each with the reason instead of a bare "not supported"."""

from typing import NoReturn

from virtvmand.call import Client, Handler
from virtvmand.errors import Code, LibvirtError
from virtvmand.table import NUMBERS

REASONS = {
    "domain_pin_vcpu": "vmand gives dedicated vCPUs cores of their own and pins them itself; mode='shared' pins none",
    "domain_pin_vcpu_flags": "vmand gives dedicated vCPUs cores of their own and pins them itself",
    "domain_set_scheduler_parameters_flags": "shares of CPU time are reservations: see deadlined",
    "domain_set_time": "nobody in the guest sets its clock for us",
    "domain_inject_nmi": "partitions take no NMI",
    "domain_abort_job": "nothing that could be given up takes long",
    "domain_open_channel": "the guest agent's socket is in vmand's directory of the partition, for root",
    "domain_interface_addresses": "nobody in the guest is asked for its addresses",
    "domain_get_hostname": "nobody in the guest is asked for its name",
}


def handlers() -> dict[int, Handler]:
    """A handler for each that refuses it."""
    return {NUMBERS[name]: _refuser(name, reason) for name, reason in REASONS.items()}


def _refuser(name: str, reason: str) -> Handler:
    def refuse(_client: Client, *_arguments: object) -> NoReturn:
        raise LibvirtError(Code.OPERATION_UNSUPPORTED, f"{name}: {reason}")

    return refuse
