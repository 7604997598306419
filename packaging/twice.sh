#!/usr/bin/env bash
# Builds a suite and architecture's packages again, elsewhere and under other circumstances, and compares the bytes:
# twice.sh [bookworm|trixie [amd64|arm64]]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
suite=${1:-bookworm}
arch=${2:-$(dpkg --print-architecture)}
first=build/deb/$suite/$arch

packaging/build.sh "$suite" "$arch"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/another place/build"
cp -r --reflink=auto build/wheels build/headers "$work/another place/build/"
(
    umask 077
    export BUILD="$work/another place/build" LC_ALL=C TZ=Pacific/Auckland HOME=/nonexistent CFLAGS=-O1 DEB_BUILD_OPTIONS=parallel=1
    nice -n 1 packaging/build.sh "$suite" "$arch"
)
second="$work/another place/build/deb/$suite/$arch"
if ! cmp "$first/manifest" "$second/manifest"; then
    diff "$first/manifest" "$second/manifest" >&2 || true
    echo "twice: the two builds differ" >&2
    exit 1
fi
(cd "$second" && sha256sum --quiet -c manifest)
echo "twice: the same bytes, $(grep -c . "$first/manifest") packages of $suite $arch"
