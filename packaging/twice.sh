#!/usr/bin/env bash
# Builds a suite and architecture's packages from a copy of the sources, elsewhere and under other circumstances, and
# compares the bytes with those in build/: twice.sh [bookworm|trixie [amd64|arm64]]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
suite=${1:-bookworm}
arch=${2:-$(dpkg --print-architecture)}
first=build/deb/$suite/$arch
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH

packaging/build.sh "$suite" "$arch"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
copy="$work/another place"
mkdir -p "$copy/build"
git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' one; do
    [[ ! -e $one ]] || printf '%s\0' "$one"
done | tar -c --null -T - | tar -x --touch -C "$copy"
cp -r --reflink=auto build/wheels build/headers "$copy/build/"
ln -s "$PWD/.venv" "$copy/.venv"
GIT_DIR=$(git rev-parse --absolute-git-dir)
(
    umask 077
    export GIT_DIR GIT_WORK_TREE=$copy LC_ALL=C TZ=Pacific/Auckland HOME=/nonexistent CFLAGS=-O1 DEB_BUILD_OPTIONS=parallel=1
    "$copy/packaging/build.sh" "$suite" "$arch"
)
second=$copy/build/deb/$suite/$arch
if ! diff "$first/manifest" "$second/manifest" >&2; then
    echo "twice: the two builds differ" >&2
    exit 1
fi
(cd "$second" && sha256sum --quiet -c manifest)
echo "twice: the same bytes, $(grep -c . "$first/manifest") packages of $suite $arch"
