#!/bin/bash
# Builds the test kernel: what edgehold.testing.rig boots to run a command under another kernel than the host's.
#
#   images/testkernel/build.sh [BUILD_DIR]
#
# Result:  BUILD_DIR/testkernel/{vmlinuz,initramfs.gz,release,modules/,headers/,module.sh,manifest}
#          (BUILD_DIR: argument, else $BUILD, else <repo>/build)
# Debian's generic kernel and not its cloud kernel, which has no 9p; headers of exactly the same version, for modules.
# Needs on the host (Debian packages): cpio kmod
#   (beyond what every Debian has: apt, dpkg, util-linux, gzip, mawk or gawk, coreutils, findutils)
#   and for module.sh: gcc-12 make libelf1 libc6-dev
# How it is cached, and when it needs root: images/apt.sh.
set -euo pipefail
export LC_ALL=C
export PATH="$PATH:/usr/sbin:/sbin" # depmod, for a user who is not root

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
build=${1:-${BUILD:-$here/../../build}}
# shellcheck source=images/apt.sh
source "$here/../apt.sh"

label=testkernel
arch=amd64
out=$build/.testkernel
link=$build/testkernel
sources=("$here/build.sh" "$here/../apt.sh" "$here/init.sh" "$here/module.sh")
results=(vmlinuz initramfs.gz release modules headers module.sh)
tools=("cpio cpio" "depmod kmod" "gzip gzip")
# What it takes to reach the host's files; all the other modules are loaded from there.
required=(virtio_pci 9p 9pnet_virtio overlay)
optional=(virtio_rng)

query() {
    local headers common kbuild shown one
    newest_kernel linux-image-amd64 || return 1
    headers=linux-headers-${kernel#linux-image-}
    common=${headers%-"$arch"}-common
    # linux-headers-6.1.0-56-amd64 goes with linux-headers-6.1.0-56-common and linux-kbuild-6.1.
    [[ $headers =~ ^linux-headers-([0-9]+\.[0-9]+) ]] || return 1
    kbuild=linux-kbuild-${BASH_REMATCH[1]}
    # The archive must have all of the same version: in the middle of an update it has not.
    shown=$(show "$headers" "$common" "$kbuild") || return 1
    for one in "$headers" "$common" "$kbuild"; do
        [[ $(field "$one" Version <<<"$shown") == "$kernel_version" ]] || return 1
    done
    packages=("$kernel $kernel_version" "$headers $kernel_version" "$common $kernel_version" "$kbuild $kernel_version")
    newest busybox-static
}

build() {
    local release=${kernel#linux-image-} tree root=$work/root one unwanted
    unpack "$kernel" "$work/kernel"
    tree=$(module_tree "$work/kernel" "$release")
    mkdir -p "$root"/{bin,dev,etc,new,proc,run,sys} "$root/lib/modules/$release"
    install -m 755 "$here/init.sh" "$root/init"
    install_busybox "$root"
    install_modules "$tree" "$root" "$release"
    pack_initramfs "$root" "$result/initramfs.gz" init bin/busybox
    cp "$work/kernel/boot/vmlinuz-$release" "$result/vmlinuz"
    echo "$release" >"$result/release"

    # Two thirds of the modules drive what no guest has.
    for unwanted in sound drivers/gpu drivers/media drivers/net/wireless drivers/infiniband drivers/iio; do
        rm -rf "${tree:?}/kernel/$unwanted"
    done
    rm -f "$tree/build" "$tree/source" # links to where a package would put the headers
    depmod -b "${tree%/lib/modules/*}" "$release"
    mkdir "$result/modules"
    mv "$tree" "$result/modules/$release"

    for one in "${packages[@]}"; do
        case $one in linux-headers-* | linux-kbuild-*) unpack "${one% *}" "$result/headers" ;; esac
    done
    # The one absolute path: the headers of the flavour include the common Makefile from where a package would be.
    # shellcheck disable=SC2016 # make expands it
    sed -i 's|^include /usr/src/|include $(dir $(lastword $(MAKEFILE_LIST)))../|' "$result/headers/usr/src/linux-headers-$release/Makefile"
    install -m 755 "$here/module.sh" "$result/module.sh"
}

cached_build
