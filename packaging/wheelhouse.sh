#!/usr/bin/env bash
# Fetches the wheels of a suite and architecture, each by its hash: wheelhouse.sh SUITE ARCH
# They stay in $BUILD/wheels/SUITE-ARCH: the next call with the same packaging/wheels-SUITE.txt needs no network.
# From where: whatever this machine's pip is set up with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=packaging/wheels.sh
. packaging/wheels.sh
suite=$1 arch=$2
python=${PYTHON:-.venv/bin/python}
build=${BUILD:-build}
out=$build/wheels/$suite-$arch
list=packaging/wheels-$suite.txt

die() {
    echo "wheelhouse: $*" >&2
    exit 1
}

# complete DIRECTORY: true if it has exactly the wheels that are listed.
complete() {
    local sum _
    [[ -d $1 ]] && (($(find "$1" -name '*.whl' | wc -l) == $(grep -c == "$list"))) || return 1
    while read -r sum _; do
        grep -q "sha256:$sum" "$list" || return 1
    done < <(sha256sum "$1"/*.whl)
}

pip_platform "$suite" "$arch" || die "suites are bookworm and trixie, architectures amd64 and arm64: not '$suite', '$arch'"
complete "$out" && exit 0
[[ -x $(command -v "$python") ]] || die "$python is missing: run 'make setup'"
mkdir -p "$build/wheels"
exec 9>"$build/wheels/.lock-$suite-$arch"
flock 9
complete "$out" && exit 0
echo "wheelhouse: fetching wheels of $suite $arch"
work=$(mktemp -d "$build/wheels/.work.XXXXXX")
trap 'rm -rf "$work"' EXIT
"$python" -m pip download "${platform[@]}" --require-hashes -r "$list" -d "$work/new" 2>"$work/log" ||
    { tail -n 15 "$work/log" >&2 && die "pip download failed"; }
complete "$work/new" || die "pip fetched other wheels than $list names"
rm -rf "$out"
mv "$work/new" "$out"
