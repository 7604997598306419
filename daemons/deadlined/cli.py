"""``deadlinectl``: what a person types to hold threads, groups and guests by reservations, and to watch them.

Here is only the table of commands: what one of them needs is loaded when it is asked for. Nothing of the daemon is.
"""

from edgehold.api.deadlined import DEFAULT_SOCKET
from edgehold.cli import client_group, completion_command
from edgehold.cli import main as run_group

COMMANDS = {
    "attach": "deadlined.cli_change:attach",
    "change": "deadlined.cli_change:change",
    "detach": "deadlined.cli_change:detach",
    "limit": "deadlined.cli_limit:limit",
    "list": "deadlined.cli_look:list_attachments",
    "show": "deadlined.cli_look:show",
    "watch": "deadlined.cli_look:watch",
    "capacity": "deadlined.cli_look:capacity",
    "replay": "deadlined.cli_replay:replay",
}
_HELP = """Give threads the CPU time that they need, guaranteed, and no more: reservations that size themselves.

\b
Begin with:
  deadlinectl attach --pid 4711 --dry-run   what would be set; changes nothing
  deadlinectl attach --pid 4711             hold it
  deadlinectl watch                         look
  deadlinectl detach 1                      every thread gets its own policy back

COMMAND --help has examples of each.
"""


@client_group(
    default_socket=DEFAULT_SOCKET,
    variable="DEADLINED_SOCKET",
    help_text=_HELP,
    commands=COMMANDS,
)
def deadlinectl() -> None:
    """The group; `client_group` makes it."""


completion_command(deadlinectl, "deadlinectl")


def main() -> None:
    """The command's entry."""
    run_group(deadlinectl, "deadlinectl")


if __name__ == "__main__":
    main()
