#!/bin/bash
# Runs a command of the small Debian 13 that build.sh made, on the files of this host. Needs root.
#
#   images/trixie/run.sh virsh -c 'vman:///system?socket=/tmp/…' list
#
# The other Debian's /usr is mounted over the host's in a mount namespace of the command's own: nobody else sees it, and
# it ends with the command. All else stays as the caller has it: sockets in /run, files, working directory, terminal.
# A chroot would hide all of that. TRIXIE: the tree, where it is not <repo>/build/trixie/root.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=${TRIXIE:-${BUILD:-$here/../../build}/trixie/root}
[[ -x $root/usr/bin/virsh ]] || {
    echo "trixie: there is no $root/usr/bin/virsh: run images/trixie/build.sh first" >&2
    exit 69
}
# Mounts must not reach the host. In a chroot the root may be no mount point, whose propagation can't be changed: where
# its mounts are shared, a copy of the tree becomes the root, on a mount of our own over /dev/shm.
# shellcheck disable=SC2016 # the inner shells expand it
exec unshare --mount --propagation unchanged sh -c '
    set -e
    if mount --make-rprivate / 2>/dev/null || ! grep -q " shared:" /proc/self/mountinfo; then
        mount --bind "$0/usr" /usr
        exec "$@"
    fi
    mount --make-private /dev/shm
    mount -t tmpfs -o mode=755 edgehold /dev/shm
    mkdir /dev/shm/root
    mount --rbind / /dev/shm/root
    mount --make-rprivate /dev/shm/root
    mount --bind "$0/usr" /dev/shm/root/usr
    exec chroot /dev/shm/root sh -c "cd \"\$0\" && exec \"\$@\"" "$PWD" "$@"' "$root" "$@"
