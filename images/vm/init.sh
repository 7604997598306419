#!/bin/sh
# PID 1 until the root file system is found: loads the drivers, mounts the first disk, hands over to its /sbin/init.
# Whatever goes wrong is said on the console and ends the machine.

export PATH=/bin
/bin/busybox --install -s /bin

fail() {
    echo "vm: $*"
    poweroff -f
}

mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "$module" || fail "$module can't be loaded"
done </etc/modules
waited=0
while [ ! -b /dev/vda ]; do
    waited=$((waited + 1))
    [ "$waited" -le 100 ] || fail "there is no disk /dev/vda"
    usleep 100000
done
mount -t ext4 -o rw /dev/vda /new || fail "/dev/vda can't be mounted"
mount -o move /dev /new/dev
umount /sys
# switch_root needs /proc no more; systemd mounts its own.
umount /proc
exec switch_root /new /sbin/init
