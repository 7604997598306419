#!/bin/sh
# PID 1 of the test kernel: makes the host's files the root and runs one command in it.
#
# The host's file tree comes by 9p (tag "root"), read-only; what the guest writes lies in memory, over it. A second
# share (tag "exchange", /run/rig inside) is the conversation with the rig:
#   modules       the directory with this kernel's modules, a path of the host
#   command.sh    what to run
#   output        what it wrote
#   status        its exit status: whole or absent
# Whatever goes wrong is said on the console and ends the guest; no status is how the rig knows.

export PATH=/bin
/bin/busybox --install -s /bin

fail() {
    echo "rig: $*"
    poweroff -f
}

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "$module" || fail "$module can't be loaded"
done </etc/modules

mkdir /run/lower /run/upper
share="-t 9p -o trans=virtio,version=9p2000.L,msize=512000"
# loose: each file is read once. Nothing else could be trusted to be the same for the whole run anyway.
# shellcheck disable=SC2086 # options, several words
mount $share,ro,cache=loose root /run/lower || fail "no share of the host's root"
mount -t tmpfs -o mode=755,size=75% upper /run/upper || fail "no tmpfs"
mkdir /run/upper/data /run/upper/work
mount -t overlay -o lowerdir=/run/lower,upperdir=/run/upper/data,workdir=/run/upper/work root /new || fail "no overlay"

# A chroot's or a container's root may be closed or lack some of these.
chmod 755 /new
cd /new || fail "no root"
mkdir -p proc sys dev run lib/modules || fail "the root can't be written"
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t devtmpfs dev dev
mkdir -p dev/pts dev/shm
mount -t devpts -o mode=620,ptmxmode=666 devpts dev/pts
mount -t tmpfs -o mode=1777 shm dev/shm
mount -t tmpfs -o mode=755 run run
mount -t cgroup2 cgroup2 sys/fs/cgroup || fail "no cgroup2"
mkdir run/rig run/lock
# shellcheck disable=SC2086 # options, several words
mount $share,access=any exchange run/rig || fail "no share for the exchange"
modules=$(cat run/rig/modules)
mount -o bind ".$modules" lib/modules || fail "no modules in $modules"
ip link set lo up
hostname rig

cp /bin/busybox run/busybox
cat >run/second.sh <<'SECOND'
echo "rig: up $(/run/busybox uname -r)"
/run/busybox setsid /bin/sh /run/rig/command.sh </dev/null >>/run/rig/output 2>&1 &
wait $!
echo $? >/run/rig/status.new
/run/busybox mv /run/rig/status.new /run/rig/status
/run/busybox poweroff -f
SECOND
exec switch_root /new /run/busybox sh /run/second.sh
