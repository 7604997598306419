#!/bin/bash
# Builds the Debian that the system tests boot: a root file system with systemd, and the packages that ours need.
#
#   images/system/build.sh SUITE [BUILD_DIR]      SUITE: bookworm or trixie
#
# Result:  BUILD_DIR/system/SUITE/root, a tree for systemd-nspawn. It is never booted itself: a machine of
#          tests/system/house.py writes into a layer of its own above it.
#          (BUILD_DIR: argument, else $BUILD, else <repo>/build)
# A machine has no network: what our packages depend on lies in the tree's apt cache, not installed, with the lists that
# vouch for it, so that apt installs our packages there as it does anywhere.
# Needs root, and a chroot is enough. From where the packages come: images/suite.sh. How it is cached: images/apt.sh.
set -euo pipefail
export LC_ALL=C

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
suite=${1:-}
build=${2:-${BUILD:-$here/../../build}}
# shellcheck source=images/apt.sh
source "$here/../apt.sh"
# shellcheck source=images/suite.sh
source "$here/../suite.sh"

label=system
[[ $suite == bookworm || $suite == trixie ]] || die "which Debian: bookworm or trixie?"
label=system/$suite
arch=$(dpkg --print-architecture)
out=$build/.system-$suite
link=$build/system/$suite
sources=("$here/build.sh" "$here/../apart.py" "$here/../apt.sh" "$here/../suite.sh")
results=(root/usr/bin/systemctl root/var/lib/dpkg/status)
tools=("debootstrap debootstrap" "python3 python3")
# What every Debian host has that our packages or a test touch; debootstrap adds what is required.
base=(systemd systemd-sysv dbus python3 procps curl)
# In the apt cache alone: what our packages depend on or suggest, and libvirt's clients.
case $arch in
amd64) later=(qemu-system-x86) ;;
arm64) later=(qemu-system-arm) ;;
*) die "no packages for $arch" ;;
esac
later+=(qemu-utils libvirt-clients python3-libvirt python3-aiohttp adduser)
own_apt

# Two hundred packages are no message.
say() { printf '%s: %.100s\n' "$label" "$*"; }

query() {
    local simulated
    write_sources || return 1
    simulated=$(apt-get "${apt_options[@]}" -s --no-install-recommends install '?priority(required)' "${base[@]}" \
        "${later[@]}" 2>/dev/null) || return 1
    # "Inst libc6 (2.41-12 Debian:13.0/stable [amd64])"
    mapfile -t packages < <(awk '$1 == "Inst" { sub(/^\(/, "", $3); print $2, $3 }' <<<"$simulated" | sort)
    [[ ${#packages[@]} -gt 0 ]]
}

# debootstrap fetches what it installs.
fetch_all() { :; }

# A machine that runs needs the tree that it started from: images/system/hold.sh holds a lock.
drop_old() {
    local one
    for one in "$out/.store/"*; do
        [[ $one == "$out/.store/$key" ]] || flock -n "$one/manifest" rm -rf "$one" || say "in use, kept: $one"
    done
}

# in_root COMMAND...
in_root() {
    chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C DEBIAN_FRONTEND=noninteractive "$@"
}

# What is downloaded is checked here, against the same lists that the machine gets.
fill_cache() {
    local archives=$root/var/cache/apt/archives
    apt-get "${apt_options[@]}" -qq -y --no-install-recommends --download-only \
        -o "Dir::State::status=$root/var/lib/dpkg/status" -o "Dir::Cache::archives=$archives" install "${later[@]}" >&2
    rm -rf "$archives/lock" "$root"/var/lib/apt/lists/*
    cp -r "$own/lists/." "$root/var/lib/apt/lists/"
    rm -f "$root/var/lib/apt/lists/lock"
    echo "deb $(mirror) $suite main" >"$root/etc/apt/sources.list"
}

# Each machine is itself; what wakes up by the clock, asks for a login or needs a network only disturbs.
settle() {
    local one
    : >"$root/etc/machine-id"
    rm -f "$root"/var/lib/dbus/machine-id "$root"/etc/resolv.conf "$root"/var/log/{bootstrap,dpkg,alternatives}.log
    echo edgehold >"$root/etc/hostname"
    echo '127.0.0.1 localhost edgehold' >"$root/etc/hosts"
    for one in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer \
        console-getty.service getty@.service; do
        ln -sf /dev/null "$root/etc/systemd/system/$one"
    done
}

build() {
    local root=$result/root include
    [[ $(id -u) -eq 0 ]] || die "debootstrap needs root"
    include=$(IFS=,; echo "${base[*]}")
    # Its mounts of /proc and /sys end with it, even where it is killed.
    python3 "$here/../apart.py" -- debootstrap --variant=minbase --include="$include" "$suite" "$root" "$(mirror)" \
        >"$work/debootstrap.log" 2>&1 || { tail -n 20 "$work/debootstrap.log" >&2; die "debootstrap failed"; }
    fill_cache
    settle
    in_root systemctl --version >/dev/null || die "the tree does not run"
    chmod 755 "$root"
}

cached_build
