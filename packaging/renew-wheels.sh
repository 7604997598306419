#!/usr/bin/env bash
# Writes packaging/wheels-SUITE.txt anew: the versions that constraints.txt has, the hashes of what pip finds now.
# To be run, and its result read, after a pin in constraints.txt changed. What is packaged is listed here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=packaging/wheels.sh
. packaging/wheels.sh
names=(aiohappyeyeballs aiohttp aiosignal attrs cffi click frozenlist idna msgspec multidict prometheus_client propcache qemu.qmp
    typing_extensions yarl)
python=${PYTHON:-.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

for name in "${names[@]}"; do
    grep -i "^$name==" constraints.txt || { echo "renew-wheels: constraints.txt has no $name" >&2 && exit 1; }
done >"$work/pins"
for suite in bookworm trixie; do
    for arch in amd64 arm64; do
        pip_platform "$suite" "$arch"
        "$python" -m pip download "${platform[@]}" -r "$work/pins" -d "$work/$suite-$arch"
    done
    {
        echo "# The wheels of edgehold-vendor for $suite, amd64 and arm64. Written by packaging/renew-wheels.sh."
        while read -r pin; do
            # Names of files have _ where names of distributions may have . or -
            file=$(tr '.-' '__' <<<"${pin%%==*}")
            sums=$(sha256sum "$work/$suite"-{amd64,arm64}/"$file"-*.whl | cut -c1-64 | awk '!seen[$0]++')
            echo "$pin \\"
            sed -e 's/^/    --hash=sha256:/' -e '$!s/$/ \\/' <<<"$sums"
        done <"$work/pins"
    } >"$work/wheels"
    cp "$work/wheels" "packaging/wheels-$suite.txt"
    echo "renew-wheels: wrote packaging/wheels-$suite.txt"
done
