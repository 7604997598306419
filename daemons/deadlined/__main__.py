"""The command line: ``deadlined [--config FILE] [--check-config]`` is the daemon; ``run`` and ``recover`` need none."""

import sys

from deadlined import config
from edgehold.errors import SettingsError
from edgehold.service import daemon_arguments, run

_COMMANDS = ("run", "recover")
_DESCRIPTION = (
    "Sizes SCHED_DEADLINE budgets from what threads really execute. `deadlined run -- COMMAND` holds one command "
    "without the daemon; `deadlined recover` puts right what a killed deadlined left; each has its own --help."
)


def main() -> int:
    """Run deadlined, or one of its commands. Returns the exit status; see `edgehold.service.run`."""
    if len(sys.argv) > 1 and sys.argv[1] in _COMMANDS:
        from deadlined import cli_run  # noqa: PLC0415 - the daemon needs none of it

        return cli_run.main(sys.argv[1], sys.argv[2:])
    arguments = daemon_arguments("deadlined", _DESCRIPTION)
    try:
        wanted = config.load(arguments.config)
    except SettingsError as error:
        sys.stderr.write(f"deadlined: {error}\n")
        return error.exit_status
    if arguments.check_config:
        sys.stdout.write("deadlined: the settings are right\n")
        return 0
    # Only now what costs time and memory: a check of the settings needs none of it.
    from deadlined.service import lifespan  # noqa: PLC0415
    from edgehold.systemd.journal import setup  # noqa: PLC0415

    setup("deadlined", wanted.log_level)
    return run("deadlined", lambda runtime: lifespan(runtime, wanted))


if __name__ == "__main__":
    sys.exit(main())
