#!/bin/bash
# Builds a small tree of Debian 13 (trixie) with its libvirt clients: what virtvmand's tests run as a second virsh.
#
#   images/trixie/build.sh [BUILD_DIR]
#
# Result:  BUILD_DIR/trixie/root: `chroot BUILD_DIR/trixie/root virsh --version` runs
#          (BUILD_DIR: argument, else $BUILD, else <repo>/build); images/trixie/run.sh runs commands of it
# Packages are unpacked, not installed: no debootstrap, no maintainer script, no loop device, no root.
# Needs nothing beyond what every Debian has: apt, dpkg, util-linux, mawk or gawk, coreutils, findutils.
# From where: the mirror that the host's own apt sources have for Debian, or TRIXIE_MIRROR=URI; signed by Debian's keys.
# How it is cached: images/apt.sh.
set -euo pipefail
export LC_ALL=C

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
build=${1:-${BUILD:-$here/../../build}}
# shellcheck source=images/apt.sh
source "$here/../apt.sh"

label=trixie
suite=trixie
arch=$(dpkg --print-architecture)
out=$build/.trixie
link=$build/trixie
sources=("$here/build.sh" "$here/../apt.sh")
results=(root/usr/bin/virsh root/usr/bin/sh)
tools=()
# virsh, and what a script needs that `virsh edit` takes for an editor.
wanted=(libvirt-clients dash sed coreutils)
keys=/usr/share/keyrings/debian-archive-keyring.gpg

# An apt of our own: the host's lists, packages and preferences are neither used nor changed.
mkdir -p "$out"/.apt/{lists/partial,cache/archives/partial}
own=$(cd "$out/.apt" && pwd -P)
: >"$own/status"
apt_options=(
    -o "APT::Architecture=$arch" -o "APT::Architectures::=$arch" -o "APT::Sandbox::User=$(id -un)"
    -o "Dir::Etc::sourcelist=$own/sources.list" -o "Dir::Etc::sourceparts=/dev/null"
    -o "Dir::Etc::preferences=/dev/null" -o "Dir::Etc::preferencesparts=/dev/null"
    -o "Dir::State::Lists=$own/lists" -o "Dir::State::status=$own/status" -o "Dir::Cache=$own/cache"
    # Some hosts switch it off, and apt is asked twice.
    -o "Dir::Cache::pkgcache=pkgcache.bin"
)

# mirror: prints the first mirror of Debian itself. apt reads its sources, so each of their formats will do.
mirror() {
    if [[ -n ${TRIXIE_MIRROR:-} ]]; then
        echo "$TRIXIE_MIRROR"
        return
    fi
    # shellcheck disable=SC2016 # apt-get expands it
    apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
        awk -F'|' '$1 == "Debian" && $2 == "Debian" && !found { print $3; found = 1 }'
}

# write_sources: false if there is no mirror.
write_sources() {
    local uri signed=
    uri=$(mirror)
    [[ -n $uri ]] || return 1
    [[ ! -e $keys ]] || signed="[signed-by=$keys] "
    echo "deb ${signed}$uri $suite main" >"$own/sources.list"
}

update_lists() {
    say "apt-get update ($1)"
    if ! write_sources; then
        # Only lists that were fetched tell whose they are.
        [[ $(id -u) -ne 0 ]] || apt-get -q update >&2 || say "apt-get update reported errors"
        write_sources || die "apt knows no mirror of Debian: run 'apt-get update' as root if the host's apt sources" \
            "have one, else name one: TRIXIE_MIRROR=URI"
    fi
    apt-get "${apt_options[@]}" -q update >&2 || die "apt-get update failed for $suite of $(mirror): where the mirror" \
        "has no $suite, name one that has: TRIXIE_MIRROR=URI; where a key is missing, install debian-archive-keyring"
}

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
