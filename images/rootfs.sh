#!/bin/bash
# Builds a Debian root file system as a tar file: what tests boot, and what node images are made of.
#
#   images/rootfs.sh SUITE ARCH OUT.tar [--deb FILE.deb]... [PACKAGE...]
#   images/rootfs.sh trixie arm64 build/rootfs/node.tar --deb build/deb/trixie/arm64/edgehold-sdk_….deb systemd-sysv
#
# Result:  OUT.tar (owners as numbers, names sorted, /dev is empty) and OUT.tar.manifest: what is in it
# SUITE: bookworm or trixie; ARCH: amd64 or arm64. In it are Debian's "minbase", the packages and the files named by
# --deb, with what they depend on but not what they recommend. Names of packages may be apt's patterns.
# Two steps: Debian's packages (cached: rebuilt when the archive has a newer version of one), then the files of --deb.
# The same packages give the same bytes; what is newer than SOURCE_DATE_EPOCH is set to it (default: the suite's date).
# No loop device. Programs of another architecture run by qemu-user (images/apart.py), which takes minutes of CPU.
# Exit status 77: this host can't do that, and says why.
# Needs root, and on the host (Debian packages): mmdebstrap arch-test python3, and for another architecture
# qemu-user-static. From where Debian's packages come: images/suite.sh; how it is cached: images/apt.sh ($BUILD).
set -euo pipefail
export LC_ALL=C

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=images/apt.sh
source "$here/apt.sh"
# shellcheck source=images/suite.sh
source "$here/suite.sh"
label=rootfs

usage() {
    echo "rootfs: usage: SUITE ARCH OUT.tar [--deb FILE.deb]... [PACKAGE...]" >&2
    exit 64
}
[[ $# -ge 3 ]] || usage
suite=$1
arch=$2
target=$3
shift 3
[[ $suite =~ ^(bookworm|trixie)$ && $arch =~ ^(amd64|arm64)$ && $target == *.tar ]] || usage
debs=()
wanted=()
while [[ $# -gt 0 ]]; do
    case $1 in
        --deb)
            [[ -f ${2:-} ]] || die "there is no file ${2:-} (--deb)"
            debs+=("$(realpath "$2")")
            shift 2
            ;;
        -*) usage ;;
        *)
            wanted+=("$1")
            shift
            ;;
    esac
done
mapfile -t wanted < <(printf '%s\n' "${wanted[@]}" | sort -u | sed '/^$/d')
[[ $(id -u) -eq 0 ]] || {
    echo "rootfs: needs root" >&2
    exit 77
}

# One place a list of packages: those that are built in turn do not drop each other.
out=${BUILD:-$here/../build}/.rootfs/$suite-$arch-$(printf '%s\n' "${wanted[@]}" | sha256sum | cut -c1-8)
link=$out/base
# Nothing else that is ours changes what is in the file.
sources=("$here/rootfs.sh")
results=(root.tar packages)
tools=("mmdebstrap mmdebstrap" "arch-test arch-test" "python3 python3" "tar tar")
own_apt

# write_sources: also what came after the release, from where the host has it for itself.
write_sources() {
    local uri security signed=
    uri=$(mirror)
    [[ -n $uri ]] || return 1
    [[ ! -e $keys ]] || signed="[signed-by=$keys] "
    # shellcheck disable=SC2016 # apt-get expands it
    security=$(apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
        awk -F'|' '$1 == "Debian" && $2 == "Debian-Security" && !found { print $3; found = 1 }')
    {
        echo "deb $signed$uri $suite main"
        echo "deb $signed$uri $suite-updates main"
        [[ -z $security ]] || echo "deb $signed$security $suite-security main"
    } >"$own/sources.list"
}

query() {
    local simulated hash
    write_sources || return 1
    # Lists of the day before are looked at again: what is built should have today's repairs.
    if [[ -z $(find "$own/lists" -name '*_Packages*' -mmin -1440 -print -quit) && -z ${asked:-} ]]; then
        asked=1
        say "apt-get update ($suite, $arch)"
        apt-get "${apt_options[@]}" -q update >&2 || say "apt-get update reported errors"
        find "$own/lists" -name '*_Packages*' -exec touch {} +
    fi
    simulated=$(apt-get "${apt_options[@]}" -s --no-install-recommends install \
        '?essential' '?priority(required)' apt "${wanted[@]}" 2>/dev/null) || return 1
    # "Inst libc6 (2.41-12 Debian:13.0/stable [amd64])"
    contents=$(awk '$1 == "Inst" { sub(/^\(/, "", $3); print $2, $3 }' <<<"$simulated" | sort)
    [[ -n $contents ]] || return 1
    hash=$(sha256sum <<<"$contents" | cut -c1-16)
    packages=("$suite packages-$hash")
}

fetch_all() { :; } # mmdebstrap fetches

apart() {
    local status=0
    python3 "$here/apart.py" --arch "$arch" -- "$@" || status=$?
    [[ $status -ne 77 ]] || exit 77
    return "$status"
}

release_date() {
    date -d "$(sed -n 's/^Date: //p' "$own"/lists/*_dists_"$suite"_{In,}Release 2>/dev/null | head -n 1)" +%s
}

# Options of the host's apt that say how the mirror is reached.
apt_reach() {
    apt-config dump 2>/dev/null | grep -E '^Acquire::(https?::Proxy|Retries)[: ]' || :
}

# root VARIANT OUT EPOCH OPTION...
make_root() {
    local variant=$1 tar=$2 epoch=$3 option options=()
    shift 3
    while read -r option; do
        options+=(--aptopt="$option")
    done < <(apt_reach)
    # In a user namespace /sys can't be mounted, and no package asks for it. Hooks run with the root's directory as $1:
    # what is the host's must not be in it.
    # shellcheck disable=SC2016
    SOURCE_DATE_EPOCH=$epoch TMPDIR=$work apart mmdebstrap --quiet --mode=root --variant="$variant" \
        --architectures="$arch" --skip=output/dev,chroot/mount/sys "${options[@]}" "$@" \
        --customize-hook='echo localhost >"$1/etc/hostname"; rm -f "$1/etc/resolv.conf"; : >"$1/etc/resolv.conf"' \
        "$suite" "$tar" "$own/sources.list" >&2 || die "mmdebstrap failed for $suite, $arch"
    mkdir -p "$work/empty/dev"
    tar -C "$work/empty" --owner=0 --group=0 --numeric-owner --mode=755 --mtime=@0 -rf "$tar" ./dev
}

build() {
    echo "$contents" >"$result/packages"
    make_root minbase "$result/root.tar" "$(release_date)" "${wanted[@]/#/--include=}"
}

# The base with the files of --deb installed in it by its own apt, which asks the mirror only for what is missing.
with_debs() { # OUT
    local unpack copy
    # shellcheck disable=SC2016 # the hooks expand it
    printf -v unpack 'tar -C "$1" --numeric-owner --xattrs --xattrs-include="*" -xf %q' "$link/root.tar"
    mkdir "$work/debs"
    cp -- "${debs[@]}" "$work/debs/"
    # shellcheck disable=SC2016
    printf -v copy 'cp -R %q "$1/debs"' "$work/debs"
    # shellcheck disable=SC2016 # the hook expands it
    make_root custom "$1" "${SOURCE_DATE_EPOCH:-$(release_date)}" --skip=update --setup-hook="$unpack" \
        --customize-hook="$copy" --customize-hook='
            set -e
            cat /etc/resolv.conf >"$1/etc/resolv.conf"
            export DEBIAN_FRONTEND=noninteractive
            install="apt-get -qq install -y --no-install-recommends"
            chroot "$1" sh -c "$install /debs/*.deb || { apt-get -qq update && $install /debs/*.deb; }"
            rm -rf "$1/debs"'
}

cached_build
# The second step has a scratch directory of its own, and nobody else's at its side.
rm -rf "${work:-}"
exec 9>"$out/.lock"
flock 9
rm -rf "$out"/.out.*
work=$(mktemp -d "$out/.out.XXXXXX")
trap 'rm -rf "$work"' EXIT
manifest=$work/manifest
{
    cat "$link/packages" "$link/manifest"
    [[ ${#debs[@]} -eq 0 ]] || {
        sha256sum "${debs[@]}" | sed 's|/.*/||'
        echo "epoch ${SOURCE_DATE_EPOCH:-suite}"
    }
} >"$manifest"
if [[ -s $target ]] && cmp -s "$manifest" "$target.manifest"; then
    say "up to date: $target"
    exit
fi
if [[ ${#debs[@]} -gt 0 ]]; then
    with_debs "$work/root.tar"
else
    cp --reflink=auto "$link/root.tar" "$work/root.tar"
fi
mkdir -p "$(dirname "$target")"
# In this order, so that a manifest never tells of a tar file that is not there yet.
rm -f "$target.manifest"
mv "$work/root.tar" "$target.new"
mv "$target.new" "$target"
cp "$manifest" "$target.manifest.new"
mv "$target.manifest.new" "$target.manifest"
say "built $target"
