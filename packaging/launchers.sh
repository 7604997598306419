#!/usr/bin/env bash
# Writes the programs of /usr/bin and /usr/sbin into a directory: launchers.sh DIRECTORY
#
# -E -s -P: neither the caller's environment, nor its home, nor the current directory says what is imported. Our own
# libraries come before Debian's and before what an administrator has put into /usr/local.
set -euo pipefail
out=$1
mkdir -p "$out"

launcher() { # PROGRAM MODULE
    cat >"$out/$1" <<END
#!/usr/bin/python3 -sEP
import sys

sys.path[:0] = ["/usr/lib/edgehold/daemons", "/usr/lib/edgehold/vendor"]

from $2 import main  # noqa: E402

sys.exit(main())
END
    chmod 755 "$out/$1"
}

launcher vmand vmand.__main__
launcher vmanctl vmand.cli
launcher virtvmand virtvmand.__main__
launcher deadlined deadlined.__main__
launcher deadlinectl deadlined.cli
