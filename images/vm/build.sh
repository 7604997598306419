#!/bin/bash
# Builds what tests/system/vm.py boots a root file system with: Debian's kernel, and an initramfs that only finds the disk.
#
#   [ARCH=amd64|arm64] images/vm/build.sh [BUILD_DIR]                                (without ARCH: this machine's)
#
# Result:  BUILD_DIR/vm/ARCH/{vmlinuz,initramfs.gz,release,modules/,manifest}   (BUILD_DIR: argument, else $BUILD, else
#          <repo>/build); modules/ has the few that a test may want, as /lib/modules of the root file system
# Debian's own initramfs has every driver: under emulation it takes most of the boot.
# Needs on the host (Debian packages): cpio kmod
#   (beyond what every Debian has: apt, dpkg, util-linux, gzip, mawk or gawk, coreutils, findutils)
# How it is cached, and when it needs root: images/apt.sh. Same inputs give the same bytes.
set -euo pipefail
export LC_ALL=C
export PATH="$PATH:/usr/sbin:/sbin" # depmod, for a user who is not root

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
build=${1:-${BUILD:-$here/../../build}}
# shellcheck source=images/apt.sh
source "$here/../apt.sh"

label=vm
native=$(dpkg --print-architecture)
arch=${ARCH:-$native}
out=$build/.vm/$arch
link=$build/vm/$arch
sources=("$here/build.sh" "$here/../apt.sh" "$here/init.sh")
results=(vmlinuz initramfs.gz release modules)
tools=("cpio cpio" "depmod kmod" "gzip gzip")
[[ $arch =~ ^(amd64|arm64)$ ]] || {
    echo "vm: architecture '$arch' is not supported (amd64, arm64)" >&2
    exit 64
}
if [[ $arch != "$native" ]]; then
    # The host's own package lists may not have this architecture: lists and cache of our own, from the host's sources.
    mkdir -p "$out"/.apt/{lists/partial,cache/archives/partial}
    own=$(cd "$out/.apt" && pwd -P)
    : >>"$own/status"
    apt_options=(
        -o "APT::Architecture=$arch" -o "APT::Architectures::=$arch" -o "APT::Sandbox::User=$(id -un)"
        -o "Dir::State::Lists=$own/lists" -o "Dir::State::status=$own/status" -o "Dir::Cache=$own/cache"
    )
fi
# ext4 asks for a checksum that no dependency names.
boot=(virtio_pci virtio_blk crc32c_generic ext4 virtio_console qemu_fw_cfg)
# Where the root is; what systemd, vmand and their tests ask for.
later=(autofs4 binfmt_misc tun virtio_net vhost_vsock vmw_vsock_virtio_transport vfat)

query() {
    newest_kernel "linux-image-$arch" && packages=("$kernel $kernel_version") && newest busybox-static
}

build() {
    local release=${kernel#linux-image-} tree root=$work/root paths path
    unpack "$kernel" "$work/kernel"
    tree=$(module_tree "$work/kernel" "$release")

    mkdir -p "$root"/{bin,dev,etc,new,proc,run,sys} "$root/lib/modules/$release"
    install -m 755 "$here/init.sh" "$root/init"
    install_busybox "$root"
    # shellcheck disable=SC2034 # module_paths reads them
    required=("${boot[@]}") optional=(virtio_rng)
    install_modules "$tree" "$root" "$release"
    pack_initramfs "$root" "$result/initramfs.gz" init bin/busybox

    # shellcheck disable=SC2034
    optional+=("${later[@]}")
    mkdir -p "$result/modules/$release"
    cp "$tree"/modules.{builtin,builtin.modinfo,order} "$result/modules/$release/"
    paths=$(module_paths "$tree") || exit 1
    while read -r path; do
        install -D -m 644 "$tree/$path" "$result/modules/$release/$path"
    done <<<"$paths"
    mkdir -p "$work/modules/lib"
    mv "$result/modules" "$work/modules/lib/modules"
    depmod -b "$work/modules" "$release"
    mv "$work/modules/lib/modules" "$result/modules"
    cp "$work/kernel/boot/vmlinuz-$release" "$result/vmlinuz"
    echo "$release" >"$result/release"
}

cached_build
