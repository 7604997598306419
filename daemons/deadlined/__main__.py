"""The daemon's command line: ``deadlined [--config FILE] [--check-config]``."""

import argparse
import sys
from pathlib import Path

from deadlined.config import Settings
from edgehold import settings
from edgehold.errors import SettingsError


def main() -> int:
    """Run deadlined. Returns the exit status; see `edgehold.service.run`."""
    parser = argparse.ArgumentParser(
        prog="deadlined", description="Sizes SCHED_DEADLINE budgets from what threads really execute."
    )
    parser.add_argument("--config", type=Path, help="settings (default: /etc/edgehold/deadlined.toml, if it is there)")
    parser.add_argument("--check-config", action="store_true", help="check the settings and exit")
    arguments = parser.parse_args()
    try:
        wanted = settings.load(Settings, "deadlined", path=arguments.config)
    except SettingsError as error:
        sys.stderr.write(f"deadlined: {error}\n")
        return error.exit_status
    if arguments.check_config:
        sys.stdout.write("the settings are right\n")
        return 0
    # Only now what costs time and memory: a check of the settings needs none of it.
    from deadlined.service import lifespan  # noqa: PLC0415
    from edgehold.service import run  # noqa: PLC0415
    from edgehold.systemd.journal import setup  # noqa: PLC0415

    setup("deadlined", wanted.log_level)
    return run("deadlined", lambda runtime: lifespan(runtime, wanted))


if __name__ == "__main__":
    sys.exit(main())
