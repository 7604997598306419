#!/bin/bash
# Runs a command whose mounts nobody else sees and which are gone with its last process. Needs root.
#
#   images/system/own-mounts.sh COMMAND [ARGUMENT...]
#
# The command has / as a mount point that is shared with nobody, which systemd-nspawn wants. A chroot's / often is no
# mount point, and then its propagation can't be changed: a copy of the tree becomes the root, mounted over a place that
# is made private first, so that the copy does not reach the host either.
set -euo pipefail
[[ $# -gt 0 ]] || {
    echo "own-mounts: which command?" >&2
    exit 64
}
# shellcheck disable=SC2016 # the inner shell expands it
exec unshare --mount --propagation unchanged bash -c '
    set -euo pipefail
    if mount --make-rslave / 2>/dev/null; then
        mount --make-rprivate /
        exec "$@"
    fi
    mount --make-private /dev/shm
    mount -t tmpfs -o mode=755,size=1m edgehold /dev/shm
    mkdir /dev/shm/root
    mount --rbind / /dev/shm/root
    mount --make-rslave /dev/shm/root
    mount --make-rprivate /dev/shm/root
    umount -l /dev/shm/root/dev/shm
    cd /dev/shm/root
    mount --move . /
    exec chroot . "$@"' own-mounts "$@"
