#!/bin/bash
# Builds the small guest: Debian's own cloud kernel, and an initramfs of busybox-static, a few drivers, init and job.
#
#   [ARCH=amd64|arm64] images/guest/build.sh [BUILD_DIR]                                (without ARCH: both)
#
# Result:  BUILD_DIR/guest/ARCH/{vmlinuz,initramfs.gz,manifest}     (BUILD_DIR: argument, else $BUILD, else <repo>/build)
# Needs on the host (Debian packages): gcc libc6-dev cpio kmod; for arm64 gcc-aarch64-linux-gnu libc6-dev-arm64-cross
#   (beyond what every Debian has: apt, dpkg, util-linux, gzip, mawk or gawk, coreutils, findutils)
# Needs no loop device and no root file system image. How it is cached, and when it needs root: images/apt.sh.
# Same inputs give the same bytes.
set -euo pipefail
export LC_ALL=C
export PATH="$PATH:/usr/sbin:/sbin" # depmod, for a user who is not root

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
build=${1:-${BUILD:-$here/../../build}}
if [[ -z ${ARCH:-} ]]; then
    for one in amd64 arm64; do
        ARCH=$one "$here/build.sh" "$build"
    done
    exit
fi
# shellcheck source=images/apt.sh
source "$here/../apt.sh"

label=guest
arch=$ARCH
out=$build/guest
link=$build/guest/$arch
sources=("$here/build.sh" "$here/../apt.sh" "$here/init.c" "$here/job.c" "$here/hog.c")
results=(vmlinuz initramfs.gz)

# Everything that depends on the architecture.
case $arch in
amd64)
    meta=linux-image-cloud-amd64
    compiler=gcc
    compiler_package=gcc
    libc_package=libc6-dev
    # Drivers by module name. A missing required one fails the build; one that is built in counts as present.
    required=(virtio_pci virtio_console virtio_net virtio_blk button evdev)
    optional=(virtio_rng vmw_vsock_virtio_transport pvpanic_pci pvpanic_mmio)
    ;;
arm64)
    # Not the cloud kernel, which has no gpio_keys: the power button of a machine that a device tree describes.
    meta=linux-image-arm64
    compiler=aarch64-linux-gnu-gcc
    compiler_package=gcc-aarch64-linux-gnu
    libc_package=libc6-dev-arm64-cross
    required=(virtio_pci virtio_console virtio_net virtio_blk gpio_pl061 gpio_keys evdev)
    # Debian's arm64 kernels have no pvpanic: QEMU is not told of such a guest's panic.
    optional=(virtio_rng vmw_vsock_virtio_transport)
    # The host's own package lists may not have this architecture, and adding it there would change the host: lists and
    # cache of our own, from the host's sources.
    mkdir -p "$out/.apt/$arch"/{lists/partial,cache/archives/partial}
    own=$(cd "$out/.apt/$arch" && pwd -P)
    : >>"$own/status"
    apt_options=(
        -o "APT::Architecture=$arch" -o "APT::Architectures::=$arch" -o "APT::Sandbox::User=$(id -un)"
        -o "Dir::State::Lists=$own/lists" -o "Dir::State::status=$own/status" -o "Dir::Cache=$own/cache"
    )
    ;;
*)
    echo "guest: architecture '$arch' is not supported (amd64, arm64)" >&2
    exit 64
    ;;
esac
tools=("$compiler $compiler_package" "cpio cpio" "depmod kmod" "gzip gzip")

query() {
    newest_kernel "$meta" && packages=("$kernel $kernel_version") && newest busybox-static
}

compile() { # SOURCE OUTPUT
    # --build-id=none: the bytes must not depend on where the build ran.
    (cd "$here" && "$compiler" -std=c11 -static -O2 -Wall -Wextra -Werror -s -Wl,--build-id=none -o "$2" "$1")
}

build() {
    local release=${kernel#linux-image-} tree root=$work/root
    [[ -e $("$compiler" -print-file-name=libc.a) ]] || die "libc.a for $arch is missing: install the Debian package $libc_package"
    "$compiler" -E -include linux/input.h -x c /dev/null >/dev/null || die "linux/input.h for $arch is missing: it comes with the Debian package $libc_package"
    unpack "$kernel" "$work/kernel"
    tree=$(module_tree "$work/kernel" "$release")

    mkdir -p "$root"/{bin,dev,etc,proc,root,sbin,sys,tmp} "$root/lib/modules/$release"
    compile init.c "$root/init"
    compile job.c "$root/sbin/edgehold-job"
    compile hog.c "$root/sbin/edgehold-hog"
    install_busybox "$root"
    install_modules "$tree" "$root" "$release"
    pack_initramfs "$root" "$result/initramfs.gz" init sbin/edgehold-job sbin/edgehold-hog bin/busybox
    cp "$work/kernel/boot/vmlinuz-$release" "$result/vmlinuz"
    chmod 644 "$result"/*
}

cached_build
