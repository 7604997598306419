"""``vmanctl``: vmand's commands by hand. The documents' spellings (``-cores 2``) work beside the usual ones.

Here is only the table of commands: what one of them needs is loaded when it is asked for. Nothing of vmand itself is.
"""

from edgehold.api.vmand import DEFAULT_SOCKET
from edgehold.cli import client_group, completion_command
from edgehold.cli import main as run_group

COMMANDS = {
    "create-partition": "vmand.cli_run:create_partition",
    "deploy": "vmand.cli_run:deploy",
    "start": "vmand.cli_run:start",
    "suspend": "vmand.cli_run:suspend",
    "restore": "vmand.cli_run:restore",
    "reboot": "vmand.cli_run:reboot",
    "shutdown": "vmand.cli_run:shutdown",
    "destroy-partition": "vmand.cli_run:destroy_partition",
    "change-partition": "vmand.cli_run:change_partition",
    "list": "vmand.cli_look:list_partitions",
    "status": "vmand.cli_look:status",
    "vcpus": "vmand.cli_look:vcpus",
    "usage": "vmand.cli_look:usage",
    "capabilities": "vmand.cli_look:capabilities",
    "doctor": "vmand.cli_look:doctor",
    "events": "vmand.cli_look:events",
    "console": "vmand.cli_console:console",
}
SHORT = {"create": "create-partition", "destroy": "destroy-partition", "change": "change-partition"}
"""Other names of commands whose own name is the documents'."""
_HELP = """Hard partitions on this host.

PARTITION is an id or a name; a number is always an id. Options take one dash or two.
"""


@client_group(
    default_socket=DEFAULT_SOCKET,
    variable="VMAND_SOCKET",
    help_text=_HELP,
    commands=COMMANDS | {short: COMMANDS[name] for short, name in SHORT.items()},
)
def vmanctl() -> None:
    """The group; `client_group` makes it."""


completion_command(vmanctl, "vmanctl")


def main() -> None:
    """The command's entry."""
    run_group(vmanctl, "vmanctl")


if __name__ == "__main__":
    main()
