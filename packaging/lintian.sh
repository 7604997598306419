#!/usr/bin/env bash
# Runs a suite's own lintian over its packages, which must be silent: lintian.sh [bookworm|trixie]
# Where this machine is another Debian, in a root of that suite (images/rootfs.sh), which takes root.
# No package overrides anything, and what one would override is shown too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
suite=${1:-bookworm}
options=(--no-cfg --allow-root --no-override --display-level '>=warning' --fail-on 'error,warning')

die() {
    echo "lintian: $*" >&2
    exit 1
}

compgen -G "build/deb/$suite/*/*.deb" >/dev/null || die "no packages of $suite: run 'make deb DIST=$suite'"
codename=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
if [[ $codename == "$suite" ]]; then
    lintian "${options[@]}" build/deb/"$suite"/*/*.deb || die "$suite: see above"
else
    arch=$(dpkg --print-architecture)
    images/rootfs.sh "$suite" "$arch" "build/lintian/$suite.tar" lintian
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    tar -C "$work" --numeric-owner -xf "build/lintian/$suite.tar"
    # Of each architecture's own directory, since packages for all of them are in each.
    mkdir "$work/debs"
    for one in build/deb/"$suite"/*; do
        cp -rL "$one" "$work/debs/"
    done
    # shellcheck disable=SC2016 # the inner shell expands it
    chroot "$work" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 \
        sh -c 'exec lintian "$@" /debs/*/*.deb' lintian "${options[@]}" || die "$suite: see above"
fi
echo "lintian: $suite: no errors, no warnings, no overrides"
