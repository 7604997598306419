#!/bin/bash
# Holds the file system of one system test's machine, and starts it: what tests/system/house.py talks to.
#
#   python3 images/apart.py -- images/system/hold.sh NAME TREE SIZE
#
# The machine sees TREE with a layer above it in memory, at most SIZE (tmpfs(5)), which outlives its boots and power cuts
# and ends with this process. Standard input: `boot` starts the machine, `cut` kills it, the input's end ends all.
# Standard output: `held DIRECTORY`, then for each boot `pid NUMBER`, of systemd-nspawn. Its console is standard error.
# Needs root, and to be alone with its mounts.
set -euo pipefail
name=$1 tree=$2 size=$3

# Two containers in one cgroup would meet in nspawn's own: each machine has one, in every tree that systemd may use.
cgroups=()
if [[ -e /sys/fs/cgroup/cgroup.controllers ]]; then
    cgroups=("/sys/fs/cgroup/$name")
else
    for one in /sys/fs/cgroup/{unified,systemd}; do
        [[ ! -d $one ]] || cgroups+=("$one/$name")
    done
fi

# Every process of the machine ends at once: nspawn's own end would leave the others running.
kill_all() {
    [[ ! -e ${cgroups[0]}/cgroup.kill ]] || echo 1 >"${cgroups[0]}/cgroup.kill"
}

remove_cgroups() {
    local one
    for one in "${cgroups[@]}"; do
        [[ ! -d $one ]] || find "$one" -depth -type d -exec rmdir {} + 2>/dev/null || return 1
    done
}

# After it, the next boot makes them anew: Linux 6.18 kills some of what systemd 257 starts in cgroups of a tree that was
# killed before.
cut() {
    local _
    kill_all
    # Killed processes take a moment to leave.
    for _ in {1..200}; do
        ! remove_cgroups || return 0
        sleep 0.05
    done
    echo "hold: the cgroups of $name are not empty" >&2
}
trap cut EXIT

boot() {
    local one
    for one in "${cgroups[@]}"; do
        mkdir -p "$one"
    done
    (
        for one in "${cgroups[@]}"; do
            echo "$BASHPID" >"$one/cgroup.procs"
        done
        export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1
        # All that the daemons may need; but modules and the clock are the host's.
        exec systemd-nspawn --quiet --directory="$root" --machine="$name" \
            --hostname=edgehold --register=no --keep-unit --console=pipe --private-network --resolv-conf=off \
            --timezone=off --link-journal=no --capability=all --drop-capability=CAP_SYS_MODULE,CAP_SYS_TIME \
            --system-call-filter='bpf perf_event_open' --boot </dev/null >&2
    ) &
    echo "pid $!"
    disown # nobody wants to hear how it ended
}

# The tree must not be dropped while we are on it.
exec 8<"$tree/../manifest"
flock -s 8

# nspawn wants a directory there that it may change; the host's is not ours.
mkdir -p /run/systemd/nspawn
mount -t tmpfs -o mode=755,size=1m edgehold /run/systemd/nspawn
place=/run/systemd/nspawn/edgehold
mkdir "$place"
mount -t tmpfs -o "mode=755,size=$size" edgehold "$place"
root=$place/root
mkdir "$place"/{upper,work,root}
# The tree's own name may have a colon, which is overlayfs' separator.
if ! (cd "$tree" && mount -t overlay -o "lowerdir=.,upperdir=$place/upper,workdir=$place/work" edgehold "$root"); then
    echo "hold: no overlay file system here, copying $tree" >&2
    cp -a "$tree/." "$root/"
fi
echo "held $root"
while read -r command; do
    case $command in
    boot) boot ;;
    cut) cut ;;
    *) echo "hold: what is '$command'?" >&2 ;;
    esac
done
