#!/usr/bin/env bash
# Python's headers of an architecture, from Debian 12's packages: headers.sh ARCH
# Not this machine's: whatever interpreter is here, the extension is compiled against the one that it promises to fit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=images/apt.sh
. images/apt.sh
# shellcheck source=images/suite.sh
. images/suite.sh

label=headers
suite=bookworm
arch=$1
out=${BUILD:-build}/headers/.$arch
link=${BUILD:-build}/headers/$arch
sources=(packaging/headers.sh images/apt.sh images/suite.sh)
results=(usr/include/python3.11/Python.h)
tools=()

query() {
    write_sources && newest libpython3.11-dev
}

build() {
    unpack libpython3.11-dev "$result"
}

own_apt
cached_build
