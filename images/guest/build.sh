#!/bin/bash
# Builds the small guest: Debian's own cloud kernel, and an initramfs of busybox-static, a few drivers, init and job.
#
#   images/guest/build.sh [BUILD_DIR]
#
# Result:  BUILD_DIR/guest/ARCH/{vmlinuz,initramfs.gz,manifest}     (BUILD_DIR: argument, else $BUILD, else <repo>/build)
# Needs on the host (Debian packages): gcc libc6-dev cpio kmod
#   (beyond what every Debian has: apt, dpkg, util-linux, gzip, mawk or gawk, coreutils, findutils)
# Needs no root, except when apt's package lists are absent or stale: `apt-get update` needs it.
# Needs no loop device and no root file system image.
#
# Cached: BUILD_DIR/guest/ARCH is a link to a directory that is named by the key (package versions and the hash of our
# own files). The same key again means nothing to do, and no network. The link is changed last and at once, so an
# interrupted build leaves nothing half made; a lock keeps two builds apart. Same inputs give the same bytes.
set -euo pipefail
export LC_ALL=C
export PATH="$PATH:/usr/sbin:/sbin" # depmod, for a user who is not root

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
build=${1:-${BUILD:-$here/../../build}}
arch=${ARCH:-amd64}

# Everything that depends on the architecture.
case $arch in
amd64)
    meta=linux-image-cloud-amd64
    compiler=gcc
    # Drivers by module name. A missing required one fails the build; one that is built in counts as present.
    required=(virtio_pci virtio_console virtio_net virtio_blk button evdev)
    optional=(virtio_rng vmw_vsock_virtio_transport pvpanic_pci pvpanic_mmio)
    ;;
*)
    echo "guest: architecture '$arch' is not supported (amd64)" >&2
    exit 64
    ;;
esac
sources=("$here/build.sh" "$here/init.c" "$here/job.c")

say() { echo "guest: $*"; }
die() {
    echo "guest: $*" >&2
    exit 1
}

# need COMMAND PACKAGE
need() {
    command -v "$1" >/dev/null || die "'$1' is missing: install the Debian package $2"
}

# field PACKAGE FIELD: reads `apt-cache show` on standard input.
field() {
    awk -v package="$1" -v field="$2" '
        $1 == "Package:" { current = $2 }
        current == package && $1 == field ":" { sub(/^[^:]*: */, ""); print; exit }'
}

# Asks apt's lists what to build from. Sets kernel, kernel_version, busybox_version; false if apt knows them not.
query() {
    local shown depends
    shown=$(apt-cache show --no-all-versions "$meta:$arch" "busybox-static:$arch" 2>/dev/null) || return 1
    depends=$(field "$meta" Depends <<<"$shown")
    # "linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)"
    [[ $depends =~ (linux-image-[^ ,]+)\ \(=\ ([^\)]+)\) ]] || return 1
    kernel=${BASH_REMATCH[1]}
    kernel_version=${BASH_REMATCH[2]}
    busybox_version=$(field busybox-static Version <<<"$shown")
    [[ -n $busybox_version ]]
}

update_lists() {
    say "apt-get update ($1)"
    [[ $(id -u) -eq 0 ]] || die "apt's package lists are absent or stale: run 'apt-get update' as root first"
    # One broken source of many is no reason to give up: whether it was ours shows in what follows.
    apt-get -q update >&2 || say "apt-get update reported errors"
}

make_key() {
    key=$arch-$(printf '%s\n' "$kernel=$kernel_version" "busybox-static=$busybox_version" "$sources_hash" | sha256sum | cut -c1-16)
}

up_to_date() {
    [[ $(readlink "$out/$arch" 2>/dev/null) == ".store/$key" && -s $out/$arch/vmlinuz && -s $out/$arch/initramfs.gz ]]
}

deb_path() { # PACKAGE VERSION
    echo "$out/.cache/$1_${2//:/%3a}_$arch.deb"
}

# fetch PACKAGE VERSION: into the cache, unless it is there. apt checks the signatures.
fetch() {
    local deb
    deb=$(deb_path "$1" "$2")
    [[ -s $deb ]] && return 0
    say "fetching $1 $2"
    rm -rf "$work/download"
    mkdir "$work/download"
    (cd "$work/download" && apt-get -q -o APT::Sandbox::User="$(id -un)" download "$1:$arch=$2") >&2 || return 1
    mv "$work"/download/*.deb "$deb"
}

fetch_all() {
    fetch "$kernel" "$kernel_version" && fetch busybox-static "$busybox_version"
}

# Prints, in load order, the paths (as in modules.dep) of the drivers and of all that they depend on.
module_paths() { # TREE: a directory with modules.dep
    local tree=$1 name must line
    for name in "${required[@]}" "${optional[@]}"; do
        must=0
        [[ " ${required[*]} " == *" $name "* ]] && must=1
        # A file may be called virtio-rng.ko where the module is virtio_rng.
        line=$(awk -F: -v name="$name" '
            { file = $1; sub(/.*\//, "", file); sub(/\.ko.*/, "", file); gsub(/-/, "_", file) }
            file == name { print; exit }' "$tree/modules.dep")
        if [[ -n $line ]]; then
            # "a.ko: b.ko c.ko" is loaded in the order c b a.
            tr -d : <<<"$line" | tr ' ' '\n' | tac
        elif ! sed 's/-/_/g' "$tree/modules.builtin" | grep -q "/$name\.ko$" && ((must)); then
            echo "guest: the kernel has no module $name" >&2
            return 1
        fi
    done | awk 'NF && !seen[$0]++'
}

compile() { # SOURCE OUTPUT
    # --build-id=none: the bytes must not depend on where the build ran.
    (cd "$here" && "$compiler" -std=c11 -static -O2 -Wall -Wextra -Werror -s -Wl,--build-id=none -o "$2" "$1")
}

build_image() {
    local release tree root=$work/root result=$work/result path
    say "building for $kernel $kernel_version, busybox $busybox_version"
    mkdir -p "$work/kernel" "$work/busybox" "$result"
    dpkg-deb -x "$(deb_path "$kernel" "$kernel_version")" "$work/kernel"
    dpkg-deb -x "$(deb_path busybox-static "$busybox_version")" "$work/busybox"

    release=${kernel#linux-image-}
    tree=$work/kernel/lib/modules/$release
    [[ -d $tree ]] || tree=$work/kernel/usr/lib/modules/$release
    [[ -d $tree ]] || die "no modules for $release in $kernel"
    depmod -b "${tree%/lib/modules/*}" "$release"

    mkdir -p "$root"/{bin,dev,etc,proc,root,sbin,sys,tmp} "$root/lib/modules/$release"
    compile init.c "$root/init"
    compile job.c "$root/sbin/edgehold-job"
    path=$work/busybox/bin/busybox
    [[ -x $path ]] || path=$work/busybox/usr/bin/busybox
    cp "$path" "$root/bin/busybox"
    ln -s busybox "$root/bin/sh"

    module_paths "$tree" >"$work/modules"
    while read -r path; do
        [[ $path == *.ko ]] || die "compressed module $path: this kernel package is newer than the build knows"
        install -D -m 644 "$tree/$path" "$root/lib/modules/$release/$path"
        echo "/lib/modules/$release/$path" >>"$root/etc/modules"
    done <"$work/modules"

    find "$root" -exec chmod u=rwX,go=rX {} +
    chmod 755 "$root/init" "$root/sbin/edgehold-job" "$root/bin/busybox"
    find "$root" -exec touch -h -d @0 {} +
    (cd "$root" && find . -print0 | sort -z | cpio --quiet --null -o -H newc --reproducible -R 0:0) | gzip -n9 >"$result/initramfs.gz"
    cp "$work/kernel/boot/vmlinuz-$release" "$result/vmlinuz"
    {
        echo "$kernel $kernel_version $arch"
        echo "busybox-static $busybox_version $arch"
        echo "edgehold-sources $sources_hash"
    } >"$result/manifest"
    chmod 644 "$result"/*

    # The only steps that others can see. `mv -T` of a link is one rename(2).
    mkdir -p "$out/.store"
    rm -rf "${out:?}/.store/$key"
    mv "$result" "$out/.store/$key"
    ln -s ".store/$key" "$work/link"
    mv -T "$work/link" "$out/$arch"
    drop_old
    say "built $out/$arch: vmlinuz $(stat -Lc %s "$out/$arch/vmlinuz") bytes, initramfs.gz $(stat -Lc %s "$out/$arch/initramfs.gz") bytes"
}

# What no key names any more. A QEMU that has already opened an old image keeps it.
drop_old() {
    find "$out/.store" -mindepth 1 -maxdepth 1 -name "$arch-*" ! -name "$key" -exec rm -rf {} +
    find "$out/.cache" -mindepth 1 -name "*_$arch.deb" \
        ! -path "$(deb_path "$kernel" "$kernel_version")" \
        ! -path "$(deb_path busybox-static "$busybox_version")" -delete
}

mkdir -p "$build/guest"
out=$(cd "$build/guest" && pwd)
need apt-cache apt
need sha256sum coreutils
sources_hash=$(cd "$here" && sha256sum "${sources[@]##*/}" | sha256sum | cut -c1-64)

if query; then
    make_key
    if up_to_date; then
        say "up to date: $out/$arch ($kernel $kernel_version)"
        exit 0
    fi
elif grep -qsx "edgehold-sources $sources_hash" "$out/$arch/manifest"; then
    # Without package lists nobody can say that there is anything newer.
    say "apt has no package lists; keeping $out/$arch"
    exit 0
fi

need apt-get apt
need dpkg-deb dpkg
need "$compiler" gcc
[[ -e $("$compiler" -print-file-name=libc.a) ]] || die "libc.a is missing: install the Debian package libc6-dev"
[[ -e /usr/include/linux/input.h ]] || die "linux/input.h is missing: install the Debian package linux-libc-dev (comes with libc6-dev)"
need cpio cpio
need depmod kmod
need gzip gzip
need flock util-linux

exec 9>"$out/.lock"
if ! flock -n 9; then
    say "waiting for another build in $out"
    flock 9
fi
mkdir -p "$out/.cache"
rm -rf "$out"/.work.* # of a build that was killed: we hold the lock
work=$(mktemp -d "$out/.work.XXXXXX")
trap 'rm -rf "$work"' EXIT

if ! query; then
    update_lists "no package lists"
    query || die "apt does not know $meta and busybox-static for $arch"
fi
if ! fetch_all; then
    # Old lists name files that the archive no longer has.
    update_lists "the download failed, the lists may be old"
    query || die "apt does not know $meta and busybox-static for $arch"
    fetch_all || die "the download failed twice"
fi
make_key
if up_to_date; then # the build that we waited for
    say "up to date: $out/$arch ($kernel $kernel_version)"
    exit 0
fi
build_image
