# shellcheck shell=bash
# A disk of two trees of files: EFI system partition and root, without a loop device or a mount. Sourced by
# images/node/build.sh, which sets `work` and `arch`; never run.
# All identifiers are fixed: two builds give the same bytes. Two disks of these in one machine are one too many.
# shellcheck disable=SC2154 # set by the script that sources this

disk_id=6f1d7a0c-93be-4c1e-8a52-0f0f6ed9e501
esp_partuuid=6f1d7a0c-93be-4c1e-8a52-0f0f6ed9e502
root_partuuid=6f1d7a0c-93be-4c1e-8a52-0f0f6ed9e503
root_uuid=6f1d7a0c-93be-4c1e-8a52-0f0f6ed9e504
root_hash_seed=6f1d7a0c-93be-4c1e-8a52-0f0f6ed9e505
esp_serial=0ed9e506
# Room for a few kernels with their initial RAM disks.
esp_mib=512
# Named, not left to the host's mke2fs.conf.
ext4_features=none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file
ext4_features+=,huge_file,dir_nlink,extra_isize,metadata_csum

# esp_image FILE TREE
esp_image() {
    local file=$1 tree=$2 one
    truncate -s "${esp_mib}M" "$file"
    mkfs.vfat -F 32 --invariant -i "$esp_serial" -n EDGEHOLD "$file" >/dev/null
    # One by one and sorted: mcopy -s would take them as the host's directories have them.
    while IFS= read -r one; do
        if [[ -d $tree/$one ]]; then
            SOURCE_DATE_EPOCH=$epoch mmd -i "$file" "::$one"
        else
            SOURCE_DATE_EPOCH=$epoch mcopy -m -i "$file" "$tree/$one" "::$one"
        fi
    done < <(cd "$tree" && find . -mindepth 1 -printf '%P\n' | sort)
}

# root_image FILE TREE EPOCH
root_image() {
    local file=$1 tree=$2 epoch=$3 kib
    # Whole blocks of its own; du would tell of the host's.
    kib=$(find "$tree" -printf '%y %s\n' | awk '{ sum += 4 * int(($1 == "f" ? $2 + 4095 : 4096) / 4096) } END { print sum }')
    # It grows at the first boot; until then it needs room for its journal and for what a boot writes.
    truncate -s "$((kib * 112 / 100 / 1024 + 256))M" "$file"
    E2FSPROGS_FAKE_TIME=$epoch SOURCE_DATE_EPOCH=$epoch mke2fs -q -t ext4 -b 4096 -I 256 -i 16384 -m 1 -O "$ext4_features" \
        -L edgehold-root -U "$root_uuid" \
        -E "hash_seed=$root_hash_seed,lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0" -d "$tree" "$file"
    same_times "$file" "$epoch"
    e2fsck -f -n "$file" >/dev/null 2>&1 || die "the root file system is damaged"
}

# used_inodes FILE: their numbers. dumpe2fs lists the free ones of each group.
used_inodes() {
    dumpe2fs "$1" 2>/dev/null | awk '
        /^Inodes per group:/ { size = $4 }
        /^Group [0-9]+:/ { first = size * group++ + 1 }
        /^  Free inodes:/ {
            used = first
            for (i = 3; i <= NF; i++) {
                n = split($i, ends, /[-,]/)
                for (; used < ends[1] + 0; used++) print used
                used = (n > 1 && ends[2] != "" ? ends[2] : ends[1]) + 1
            }
            for (; used < first + size; used++) print used
        }'
}

# same_times FILE EPOCH: mke2fs copies when a file was last read and changed, which is when this build unpacked it.
same_times() {
    used_inodes "$1" | awk -v at="@$2" '
        $1 == 2 || $1 >= 11 { printf "sif <%d> atime %s\nsif <%d> ctime %s\n", $1, at, $1, at }' >"$work/times"
    E2FSPROGS_FAKE_TIME=$2 debugfs -w -f "$work/times" "$1" >/dev/null 2>"$work/times.log" || die "debugfs failed: $(tail -n 3 "$work/times.log")"
    rm "$work/times" "$work/times.log"
}

# disk_image FILE ESP_TREE ROOT_TREE EPOCH
disk_image() {
    local file=$1 root_type root_mib
    case $arch in
        amd64) root_type=4f68bce3-e8cd-4db1-96e7-fbcaf984b709 ;;
        arm64) root_type=b921b045-1df0-41c3-af44-4c6f280d3fae ;;
    esac
    esp_image "$work/esp.img" "$2"
    root_image "$work/root.img" "$3" "$4"
    root_mib=$(($(stat -c %s "$work/root.img") >> 20))
    truncate -s "$((1 + esp_mib + root_mib + 1))M" "$file"
    sfdisk -q "$file" <<END
label: gpt
label-id: $disk_id
start=1MiB, size=${esp_mib}MiB, type=c12a7328-f81f-11d2-ba4b-00a0c93ec93b, uuid=$esp_partuuid, name=esp
start=$((1 + esp_mib))MiB, size=${root_mib}MiB, type=$root_type, uuid=$root_partuuid, name=root
END
    dd if="$work/esp.img" of="$file" bs=1M seek=1 conv=sparse,notrunc status=none
    dd if="$work/root.img" of="$file" bs=1M seek="$((1 + esp_mib))" conv=sparse,notrunc status=none
    rm "$work/esp.img" "$work/root.img"
}
