"""The daemon's command line: ``deadlined [--config FILE] [--check-config]``."""

import sys

from deadlined.config import Settings
from edgehold import settings
from edgehold.errors import SettingsError
from edgehold.service import daemon_arguments, run


def main() -> int:
    """Run deadlined. Returns the exit status; see `edgehold.service.run`."""
    arguments = daemon_arguments("deadlined", "Sizes SCHED_DEADLINE budgets from what threads really execute.")
    try:
        wanted = settings.load(Settings, "deadlined", path=arguments.config)
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
