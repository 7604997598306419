#!/bin/bash
# Builds a test kernel: what edgehold.testing.rig boots to run a command under another kernel than the host's.
#
#   images/testkernel/build.sh [BUILD_DIR]
#   KERNEL=6.12 images/testkernel/build.sh [BUILD_DIR]
#
# Result:  BUILD_DIR/testkernel/{vmlinuz,initramfs.gz,release,modules/,headers/,module.sh,manifest}
#          BUILD_DIR/testkernel-6.12/{vmlinuz,initramfs.gz,release,modules/,manifest}
#          (BUILD_DIR: argument, else $BUILD, else <repo>/build)
# Debian's generic kernel and not its cloud kernel, which has no 9p. The first is the host's own Debian's (bookworm: 6.1),
# with headers of exactly the same version, for modules. The second is trixie's (6.12), where a test wants two kernels:
# only the modules that it boots with, no headers.
# Needs on the host (Debian packages): cpio kmod, and for 6.12 xz-utils
#   (beyond what every Debian has: apt, dpkg, util-linux, gzip, mawk or gawk, coreutils, findutils)
#   and for module.sh: gcc-12 make libelf1 libc6-dev
# How it is cached, and when it needs root: images/apt.sh. From where trixie's packages come: images/suite.sh.
set -euo pipefail
export LC_ALL=C
export PATH="$PATH:/usr/sbin:/sbin" # depmod, for a user who is not root

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
build=${1:-${BUILD:-$here/../../build}}
# shellcheck source=images/apt.sh
source "$here/../apt.sh"
# shellcheck source=images/suite.sh
source "$here/../suite.sh"

arch=amd64
sources=("$here/build.sh" "$here/../apt.sh" "$here/init.sh")
results=(vmlinuz initramfs.gz release modules)
tools=("cpio cpio" "depmod kmod" "gzip gzip")
case ${KERNEL:-6.1} in
    6.1)
        label=testkernel
        suite=
        sources+=("$here/module.sh")
        results+=(headers module.sh)
        ;;
    6.12)
        label=testkernel-6.12
        suite=trixie
        sources+=("$here/../suite.sh")
        tools+=("xz xz-utils")
        ;;
    *)
        echo "testkernel: KERNEL=$KERNEL: 6.1 or 6.12" >&2
        exit 64
        ;;
esac
out=$build/.$label
link=$build/$label
if [[ $suite ]]; then own_apt; fi
# What it takes to reach the host's files; all the other modules are loaded from there.
required=(virtio_pci 9p 9pnet_virtio overlay)
optional=(virtio_rng)

query() {
    local headers common kbuild shown one
    if [[ $suite ]]; then
        write_sources || return 1
    fi
    newest_kernel linux-image-amd64 || return 1
    packages=("$kernel $kernel_version")
    newest busybox-static || return 1
    [[ ! $suite ]] || return 0

    headers=linux-headers-${kernel#linux-image-}
    common=${headers%-"$arch"}-common
    # linux-headers-6.1.0-56-amd64 goes with linux-headers-6.1.0-56-common and linux-kbuild-6.1.
    [[ $headers =~ ^linux-headers-([0-9]+\.[0-9]+) ]] || return 1
    kbuild=linux-kbuild-${BASH_REMATCH[1]}
    # The archive must have all of the same version: in the middle of an update it has not.
    shown=$(show "$headers" "$common" "$kbuild") || return 1
    for one in "$headers" "$common" "$kbuild"; do
        [[ $(field "$one" Version <<<"$shown") == "$kernel_version" ]] || return 1
        packages+=("$one $kernel_version")
    done
}

# Two thirds of the modules drive what no guest has.
drop_unwanted() { # TREE
    local unwanted
    for unwanted in sound drivers/gpu drivers/media drivers/net/wireless drivers/infiniband drivers/iio; do
        rm -rf "${1:?}/kernel/$unwanted"
    done
}

# Leaves only what the boot needs, as files that busybox can load: trixie's are compressed.
keep_needed() { # TREE
    local paths wanted
    paths=$(module_paths "$1") || exit 1
    mapfile -t wanted <<<"$paths"
    find "$1/kernel" -name '*.ko*' -printf 'kernel/%P\n' | grep -vxFf <(printf '%s\n' "${wanted[@]}") |
        (cd "$1" && xargs -d '\n' rm --)
    find "$1/kernel" -type d -empty -delete
    find "$1/kernel" -name '*.ko.xz' -exec xz -d {} +
}

build() {
    local release=${kernel#linux-image-} tree root=$work/root
    unpack "$kernel" "$work/kernel"
    tree=$(module_tree "$work/kernel" "$release")
    rm -f "$tree/build" "$tree/source" # links to where a package would put the headers
    if [[ $suite ]]; then keep_needed "$tree"; else drop_unwanted "$tree"; fi
    depmod -b "${tree%/lib/modules/*}" "$release"

    mkdir -p "$root"/{bin,dev,etc,new,proc,run,sys} "$root/lib/modules/$release"
    install -m 755 "$here/init.sh" "$root/init"
    install_busybox "$root"
    install_modules "$tree" "$root" "$release"
    pack_initramfs "$root" "$result/initramfs.gz" init bin/busybox
    cp "$work/kernel/boot/vmlinuz-$release" "$result/vmlinuz"
    echo "$release" >"$result/release"
    mkdir "$result/modules"
    mv "$tree" "$result/modules/$release"
    [[ $suite ]] || add_headers "$release"
}

add_headers() { # RELEASE
    local one
    for one in "${packages[@]}"; do
        case $one in linux-headers-* | linux-kbuild-*) unpack "${one% *}" "$result/headers" ;; esac
    done
    # The one absolute path: the headers of the flavour include the common Makefile from where a package would be.
    # shellcheck disable=SC2016 # make expands it
    sed -i 's|^include /usr/src/|include $(dir $(lastword $(MAKEFILE_LIST)))../|' "$result/headers/usr/src/linux-headers-$1/Makefile"
    install -m 755 "$here/module.sh" "$result/module.sh"
}

cached_build
