#!/bin/bash
# Builds a disk image of a node: a bootable Debian with Edgehold's packages, set up at its first boot by credentials.
#
#   images/node/build.sh [BUILD_DIR]
#   ARCH=arm64 DIST=trixie images/node/build.sh
#
# Result:  BUILD_DIR/image/ARCH (of bookworm; of another suite BUILD_DIR/image/SUITE-ARCH):
#            disk.img       GPT: the EFI system partition with systemd-boot, and the root file system; sparse
#            disk.img.zst   the same, to be written to a disk
#            vmlinuz, initrd.img, cmdline    for machines that load a kernel themselves
#            manifest       every package with its version, and the hash of each file here
#          (BUILD_DIR: argument, else $BUILD, else <repo>/build)
# ARCH: amd64 or arm64 (default: this machine's); DIST: bookworm (default) or trixie.
# Our packages: BUILD_DIR/deb/DIST/ARCH (make deb), or the directory that EDGEHOLD_DEBS names. NODE_PACKAGES: more of
# Debian's, by name. NODE_MIRROR=URI: where the node's apt gets Debian from (default: where this build got it).
# The same packages and options give the same bytes: all identifiers are fixed, no time is later than SOURCE_DATE_EPOCH
# (default: the date of our packages), and what each node must have for itself is not in it.
# No loop device, no mount. Needs root, and on the host (Debian packages): e2fsprogs dosfstools mtools fdisk zstd
# systemd, and what images/rootfs.sh needs. Exit status 77: this host can't, and says why.
set -euo pipefail
export LC_ALL=C TZ=UTC

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export BUILD=${1:-${BUILD:-$here/../../build}}
mkdir -p "$BUILD"
BUILD=$(cd "$BUILD" && pwd -P)
# shellcheck source=images/apt.sh
source "$here/../apt.sh"
# shellcheck source=images/node/disk.sh
source "$here/disk.sh"

label=image
arch=${ARCH:-$(dpkg --print-architecture)}
suite=${DIST:-bookworm}
[[ $suite =~ ^(bookworm|trixie)$ ]] || die "DIST is bookworm or trixie, not '$suite'"
case $arch in
    amd64)
        qemu="qemu-system-x86"
        efi=x64
        # A node may have a screen, a serial port, both or neither; the last one that exists gets what the boot says.
        console="console=tty0 console=ttyS0,115200n8"
        ;;
    arm64)
        qemu="qemu-system-arm"
        efi=aa64
        # The firmware says which serial port it is; a word here would overrule it.
        console=
        ;;
    *) die "ARCH is amd64 or arm64, not '$arch'" ;;
esac
label=image/$suite-$arch
name=$arch
[[ $suite == bookworm ]] || name=$suite-$arch
out=$BUILD/.image-$suite-$arch
link=$BUILD/image/$name
options="root=PARTUUID=$root_partuuid${console:+ $console}"

# What a node has beside our packages, which bring QEMU: named here so that it is in the base, which is cached.
wanted=(
    "linux-image-$arch" initramfs-tools zstd systemd systemd-sysv systemd-boot systemd-resolved systemd-timesyncd udev
    dbus libnss-myhostname kmod e2fsprogs dosfstools openssh-server ca-certificates iproute2 procps less nano-tiny python3
    "$qemu" qemu-utils
)
[[ $suite == bookworm ]] || wanted+=(systemd-repart)
read -ra more <<<"${NODE_PACKAGES:-}"
wanted+=("${more[@]}")

# our_packages: sets debs.
our_packages() {
    local one directory=${EDGEHOLD_DEBS:-$BUILD/deb/$suite/$arch}
    debs=()
    for one in sdk vendor common vmand virtvmand deadlined node; do
        debs+=("$directory"/edgehold-"$one"_*.deb)
    done
    debs+=("$directory"/edgehold_*.deb)
    for one in "${debs[@]}"; do
        [[ -f $one ]] || die "there is no $one: run 'make deb ARCH=$arch DIST=$suite'"
    done
}

# date_of DEB: when it was made, in seconds.
date_of() {
    local line
    line=$(dpkg-deb --ctrl-tarfile "$1" | tar -t -v --full-time -f - ./control)
    date -d "$(awk '{ print $4, $5 }' <<<"$line")" +%s
}

# unpack_root: sets tree. Owners, modes and attributes are the tar's.
unpack_root() {
    tree=$work/root
    mkdir "$tree"
    tar -C "$tree" --numeric-owner --xattrs --xattrs-include='*' -xpf "$out/root.tar"
}

# What makes a Debian a node: the files of root/, where things are, what starts.
set_up() {
    local sources=$tree/etc/apt/sources.list
    cp -R --no-preserve=mode,ownership "$here/root/." "$tree/"
    printf '%s\n' "$options" >"$tree/etc/kernel/cmdline"
    mkdir -p "$tree/boot/efi"
    printf '%s\n' \
        "PARTUUID=$root_partuuid / ext4 errors=remount-ro,x-systemd.growfs 0 1" \
        "PARTUUID=$esp_partuuid /boot/efi vfat umask=0077,nofail 0 2" >"$tree/etc/fstab"
    echo LANG=C.UTF-8 >"$tree/etc/default/locale"
    ln -sfn ../run/systemd/resolve/stub-resolv.conf "$tree/etc/resolv.conf"
    [[ -z ${NODE_MIRROR:-} ]] || sed -i -E "s#(https?|ftp)://[^ ]+#$NODE_MIRROR#" "$sources"
    # Not the links of System V, which are made by a program of the node's.
    export SYSTEMCTL_SKIP_SYSV=1
    systemctl --root="$tree" -q enable systemd-networkd.service systemd-resolved.service systemd-timesyncd.service \
        ssh.service edgehold-firstboot.service
    # Nothing here waits for the network, and a node may have none. e2scrub is for volumes of LVM.
    systemctl --root="$tree" -q disable systemd-networkd-wait-online.service e2scrub_reap.service e2scrub_all.timer
}

# Each node makes these for itself. An empty machine-id is no "first boot" of systemd's, which would ask questions on
# the console and reset which services start.
make_nobody() {
    : >"$tree/etc/machine-id"
    rm -f "$tree"/etc/{hostname,ssh/ssh_host_*} "$tree"/var/lib/{dbus/machine-id,systemd/random-seed}
    rm -rf "$tree"/var/lib/apt/lists/* "$tree"/var/cache/{apt,ldconfig,debconf}/* "$tree"/{tmp,var/tmp,run}/*
    find "$tree/var/log" -type f -delete
    [[ $(stat -c %a "$tree/etc/shadow") == 640 ]] || die "/etc/shadow has wrong rights"
    grep -q '^root:[*!]' "$tree/etc/shadow" || die "root has a password in the image"
}

# set_kernel: kernel_release; the newest, if there are two.
set_kernel() {
    kernel_release=$(find "$tree/boot" -name 'vmlinuz-*' -printf '%f\n' | sed 's/^vmlinuz-//' | sort -V | tail -n 1)
    [[ -n $kernel_release ]] || die "there is no kernel in the root file system"
    [[ -s $tree/boot/initrd.img-$kernel_release ]] || die "there is no initial RAM disk for $kernel_release"
}

# The partition's files, as `bootctl install` and kernel-install would have them: both go on from here when they upgrade.
fill_esp() {
    local loader=$tree/usr/lib/systemd/boot/efi/systemd-boot$efi.efi entry
    [[ -f $loader ]] || loader+=.signed # trixie has that one alone
    esp=$work/esp
    entry=$esp/loader/entries/edgehold-$kernel_release.conf
    mkdir -p "$esp"/{EFI/{BOOT,Linux,systemd},loader/entries,"edgehold/$kernel_release"}
    cp "$loader" "$esp/EFI/BOOT/BOOT${efi^^}.EFI"
    cp "$loader" "$esp/EFI/systemd/systemd-boot$efi.efi"
    cp "$tree/boot/vmlinuz-$kernel_release" "$esp/edgehold/$kernel_release/linux"
    cp "$tree/boot/initrd.img-$kernel_release" "$esp/edgehold/$kernel_release/"
    printf '%s\n' "timeout 3" >"$esp/loader/loader.conf"
    echo type1 >"$esp/loader/entries.srel"
    # shellcheck disable=SC1091 # it is the node's
    printf '%-10s %s\n' title "$(. "$tree/etc/os-release" && echo "$PRETTY_NAME")" version "$kernel_release" \
        sort-key debian options "$options" linux "/edgehold/$kernel_release/linux" \
        initrd "/edgehold/$kernel_release/initrd.img-$kernel_release" >"$entry"
}

build() {
    say "making the image"
    unpack_root
    set_kernel
    set_up
    make_nobody
    fill_esp
    find "$tree" "$esp" -newermt "@$epoch" -exec touch -h -d "@$epoch" {} +
    disk_image "$result/disk.img" "$esp" "$tree" "$epoch"
    cp "$tree/boot/vmlinuz-$kernel_release" "$result/vmlinuz"
    cp "$tree/boot/initrd.img-$kernel_release" "$result/initrd.img"
    echo "$options" >"$result/cmdline"
    say "compressing it"
    zstd -q -T0 -9 "$result/disk.img" -o "$result/disk.img.zst"
    {
        cat "$work/manifest"
        (cd "$result" && sha256sum cmdline disk.img disk.img.zst initrd.img vmlinuz)
    } >"$result/manifest"
    chmod 644 "$result"/*
}

up_to_date() {
    [[ -s $link/disk.img ]] && head -n "$(wc -l <"$work/manifest")" "$link/manifest" 2>/dev/null | cmp -s - "$work/manifest"
}

[[ $(id -u) -eq 0 ]] || {
    echo "$label: needs root: the files of a root file system are root's" >&2
    exit 77
}
for one in "mke2fs e2fsprogs" "debugfs e2fsprogs" "mkfs.vfat dosfstools" "mcopy mtools" "sfdisk fdisk" "zstd zstd" \
    "systemctl systemd" "flock util-linux"; do
    # shellcheck disable=SC2086 # command and package, two words
    need $one
done
our_packages
epoch=${SOURCE_DATE_EPOCH:-$(date_of "${debs[-1]}")}
mkdir -p "$out" "$(dirname "$link")"
exec 9>"$out/.lock"
if ! flock -n 9; then
    say "waiting for another build in $out"
    flock 9
fi
rm -rf "$out"/.work.* # of a build that was killed: we hold the lock
work=$(mktemp -d "$out/.work.XXXXXX")
trap 'rm -rf "$work"' EXIT
arguments=()
for one in "${debs[@]}"; do
    arguments+=(--deb "$one")
done
SOURCE_DATE_EPOCH=$epoch "$here/../rootfs.sh" "$suite" "$arch" "$out/root.tar" "${arguments[@]}" "${wanted[@]}" 9>&-
{
    cat "$out/root.tar.manifest"
    echo "edgehold-image $(cd "$here" && find build.sh disk.sh root -type f -print0 | sort -z | xargs -0 sha256sum |
        sha256sum | cut -c1-64) ${NODE_MIRROR:-}"
} >"$work/manifest"
if up_to_date; then
    say "up to date: $link"
    exit
fi
result=$work/result
mkdir "$result"
build
# The link is changed last and at once. A QEMU that has already opened the old image keeps it.
old=$(readlink -f "$link" || :)
store=$out/store-$(sha256sum "$result/manifest" | cut -c1-16)
rm -rf "$store"
mv "$result" "$store"
ln -s "$(realpath --relative-to="$(dirname "$link")" "$store")" "$work/link"
mv -T "$work/link" "$link"
[[ -z $old || $old == "$store" || $old != "$out"/store-* ]] || rm -rf "$old"
say "built $link"
