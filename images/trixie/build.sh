#!/bin/bash
# Builds a small tree of Debian 13 (trixie) with its libvirt clients: what virtvmand's tests run as a second virsh.
#
#   images/trixie/build.sh [BUILD_DIR]
#
# Result:  BUILD_DIR/trixie/root: `chroot BUILD_DIR/trixie/root virsh --version` runs
#          (BUILD_DIR: argument, else $BUILD, else <repo>/build); images/trixie/run.sh runs commands of it
# Packages are unpacked, not installed: no debootstrap, no maintainer script, no loop device, no root.
# Needs nothing beyond what every Debian has: apt, dpkg, util-linux, mawk or gawk, coreutils, findutils.
# From where they come: images/suite.sh. How it is cached: images/apt.sh.
set -euo pipefail
export LC_ALL=C

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
build=${1:-${BUILD:-$here/../../build}}
# shellcheck source=images/apt.sh
source "$here/../apt.sh"
# shellcheck source=images/suite.sh
source "$here/../suite.sh"

label=trixie
suite=trixie
arch=$(dpkg --print-architecture)
out=$build/.trixie
link=$build/trixie
sources=("$here/build.sh" "$here/../apt.sh" "$here/../suite.sh")
results=(root/usr/bin/virsh root/usr/bin/sh)
tools=()
# virsh, and what a script needs that `virsh edit` takes for an editor.
wanted=(libvirt-clients dash sed coreutils)
own_apt

# All in one go: an apt-get for each of seventy packages takes longer than their download.
fetch_all() {
    local one deb missing=()
    for one in "${packages[@]}"; do
        # shellcheck disable=SC2086 # name and version, two words
        [[ -s $(deb_path $one) ]] || missing+=("$one")
    done
    [[ ${#missing[@]} -gt 0 ]] || return 0
    say "fetching ${#missing[@]} packages"
    rm -rf "$work/download"
    mkdir "$work/download"
    (cd "$work/download" && apt-get "${apt_options[@]}" -qq download "${missing[@]/ /=}") >&2 || return 1
    for one in "$work"/download/*.deb; do
        # shellcheck disable=SC2016 # dpkg-deb expands it
        deb=$(dpkg-deb -W --showformat='${Package} ${Version}' "$one")
        # shellcheck disable=SC2086 # name and version, two words
        mv "$one" "$(deb_path $deb)"
    done
}

# apt resolves what it takes, as on a machine where nothing is installed.
query() {
    local simulated
    write_sources || return 1
    simulated=$(apt-get "${apt_options[@]}" -s --no-install-recommends install "${wanted[@]}" 2>/dev/null) || return 1
    # "Inst libc6 (2.41-12 Debian:13.0/stable [amd64])"
    mapfile -t packages < <(awk '$1 == "Inst" { sub(/^\(/, "", $3); print $2, $3 }' <<<"$simulated" | tac)
    [[ ${#packages[@]} -gt 0 ]]
}

build() {
    local one root=$result/root
    # Debian's merged /usr: its links are made by a script of a package, so here.
    mkdir -p "$root"/{dev,etc,proc,root,run,sys,tmp,usr/{bin,lib,lib64,sbin},var}
    for one in bin lib lib64 sbin; do
        ln -s "usr/$one" "$root/$one"
    done
    ln -s /run "$root/var/run"
    for one in "${packages[@]}"; do
        unpack "${one% *}" "$root"
    done
    rm -rf "$root"/usr/share/{doc,info,locale,man}
    [[ -e $root/usr/bin/sh ]] || ln -s dash "$root/usr/bin/sh"
    echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
    echo 'root:x:0:' >"$root/etc/group"
    # Somebody else's build directory may be entered by anybody.
    chmod 755 "$root"
}

cached_build
