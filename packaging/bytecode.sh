#!/usr/bin/env bash
# Byte code of a package is made when it is installed and goes when it goes: bytecode.sh PACKAGE DIRECTORY
# Adds to the snippets that debhelper makes the maintainer scripts of.
set -euo pipefail

cat >>"debian/$1.postinst.debhelper" <<END
py3compile -p $1 $2
END
cat >>"debian/$1.prerm.debhelper" <<END
py3clean -p $1 $2
END
