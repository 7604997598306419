#!/bin/bash
# Builds a kernel module for the test kernel, outside of the kernel's tree.
#
#   build/testkernel/module.sh SOURCE_DIR OUT_DIR [MAKE_ARGUMENT...]
#
# SOURCE_DIR has a Kbuild or Makefile of the kernel's kind (obj-m := NAME.o) and stays as it is: the build happens in
# OUT_DIR (made here), where it leaves NAME.ko. What lies outside of SOURCE_DIR comes by an absolute path, for example
# KCFLAGS=-I/path/to/headers.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "module.sh: usage: SOURCE_DIR OUT_DIR [MAKE_ARGUMENT...]" >&2
    exit 64
fi
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
mkdir -p "$2"
from=$(cd "$1" && pwd)
to=$(cd "$2" && pwd)
shift 2
cp -R "$from/." "$to/"
# The compiler that the kernel was built with; its name is in the headers' own .kernelvariables.
exec make --no-print-directory -C "$here/headers/usr/src/linux-headers-$(cat "$here/release")" M="$to" "$@" modules
