# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # the script that sources this sets and reads these variables
# What the builds of images from Debian packages share. Sourced by images/*/build.sh, never run.
#
# A script sets these and then calls `cached_build`:
#   label     the word before each message
#   arch      Debian's name of the architecture
#   out       directory of our own .store, .cache and .lock
#   link      what everybody else uses: a link to the newest result in $out/.store
#   sources   files whose contents belong to the key
#   results   what a complete result has, as paths below the link
#   tools     "COMMAND PACKAGE" for each program that the build runs
#   query     a function: asks apt's lists and sets `packages` ("NAME VERSION" each); false if apt knows them not
#   build     a function: makes the results in $result; $work is its scratch directory, `unpack` gives it the packages
# and may set apt_options, for package lists of another architecture.
#
# Cached: the link leads to a directory that is named by the key (package versions and the hash of the sources). The
# same key again means nothing to do, and no network. The link is changed last and at once, so an interrupted build
# leaves nothing half made; a lock keeps two builds apart. Needs no root, except when apt's package lists are absent or
# stale: `apt-get update` needs it.

apt_options=()
packages=()

say() { echo "$label: $*"; }
die() {
    echo "$label: $*" >&2
    exit 1
}

# need COMMAND PACKAGE
need() {
    command -v "$1" >/dev/null || die "'$1' is missing: install the Debian package $2"
}

# field PACKAGE FIELD: reads `apt-cache show` on standard input.
field() {
    awk -v package="$1" -v field="$2" '
        $1 == "Package:" { current = $2 }
        current == package && $1 == field ":" { sub(/^[^:]*: */, ""); print; exit }'
}

# show PACKAGE...: what apt's lists say of the newest version of each.
show() {
    apt-cache "${apt_options[@]}" show --no-all-versions "${@/%/:$arch}" 2>/dev/null
}

# newest_kernel META: sets kernel (the package that META stands for) and kernel_version.
newest_kernel() {
    local shown depends
    shown=$(show "$1") || return 1
    depends=$(field "$1" Depends <<<"$shown")
    # "linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)"
    [[ $depends =~ (linux-image-[^ ,]+)\ \(=\ ([^\)]+)\) ]] || return 1
    kernel=${BASH_REMATCH[1]}
    kernel_version=${BASH_REMATCH[2]}
}

# newest PACKAGE: adds it to `packages` with the version that apt would take.
newest() {
    local shown version
    shown=$(show "$1") || return 1
    version=$(field "$1" Version <<<"$shown")
    [[ -n $version ]] && packages+=("$1 $version")
}

update_lists() {
    say "apt-get update ($1)"
    [[ $(id -u) -eq 0 || ${#apt_options[@]} -gt 0 ]] || die "apt's package lists are absent or stale: run 'apt-get update' as root first"
    # One broken source of many is no reason to give up: whether it was ours shows in what follows.
    apt-get "${apt_options[@]}" -q update >&2 || say "apt-get update reported errors"
}

deb_path() { # PACKAGE VERSION
    echo "$out/.cache/$1_${2//:/%3a}_$arch.deb"
}

# fetch PACKAGE VERSION: into the cache, unless it is there. apt checks the signatures.
fetch() {
    local deb
    deb=$(deb_path "$1" "$2")
    [[ -s $deb ]] && return 0
    say "fetching $1 $2"
    rm -rf "$work/download"
    mkdir "$work/download"
    (cd "$work/download" && apt-get "${apt_options[@]}" -q -o APT::Sandbox::User="$(id -un)" download "$1:$arch=$2") >&2 || return 1
    mv "$work"/download/*.deb "$deb"
}

fetch_all() {
    local one
    for one in "${packages[@]}"; do
        # shellcheck disable=SC2086 # name and version, two words
        fetch $one || return 1
    done
}

# unpack PACKAGE DIRECTORY
unpack() {
    local one
    mkdir -p "$2"
    for one in "${packages[@]}"; do
        [[ ${one% *} == "$1" ]] || continue
        dpkg-deb -x "$(deb_path "$1" "${one#* }")" "$2"
        return
    done
    die "$1 was not asked for"
}

# module_tree DIRECTORY RELEASE: the directory of an unpacked kernel's modules, with its modules.dep.
module_tree() {
    local tree=$1/lib/modules/$2
    [[ -d $tree ]] || tree=$1/usr/lib/modules/$2
    [[ -d $tree ]] || die "no modules for $2 in its package"
    depmod -b "${tree%/lib/modules/*}" "$2"
    echo "$tree"
}

# Prints, in load order, the paths (as in modules.dep) of the drivers of the arrays required and optional and of all
# that they depend on. A missing required one is an error; one that is built in counts as present.
module_paths() { # TREE: a directory with modules.dep
    local tree=$1 name must line
    for name in "${required[@]}" "${optional[@]}"; do
        must=0
        [[ " ${required[*]} " == *" $name "* ]] && must=1
        # A file may be called virtio-rng.ko where the module is virtio_rng.
        line=$(awk -F: -v name="$name" '
            { file = $1; sub(/.*\//, "", file); sub(/\.ko.*/, "", file); gsub(/-/, "_", file) }
            file == name { print; exit }' "$tree/modules.dep")
        if [[ -n $line ]]; then
            # "a.ko: b.ko c.ko" is loaded in the order c b a.
            tr -d : <<<"$line" | tr ' ' '\n' | tac
        elif ! grep -qx "\(.*/\)\?${name//_/[-_]}\.ko" "$tree/modules.builtin" && ((must)); then
            echo "$label: the kernel has no module $name" >&2
            return 1
        fi
    done | awk 'NF && !seen[$0]++'
}

# install_modules TREE ROOT RELEASE: copies the drivers into an initramfs; ROOT/etc/modules names them in load order.
install_modules() {
    local path paths
    paths=$(module_paths "$1") || exit 1
    while read -r path; do
        [[ $path == *.ko ]] || die "compressed module $path: this kernel package is newer than the build knows"
        install -D -m 644 "$1/$path" "$2/lib/modules/$3/$path"
        echo "/lib/modules/$3/$path" >>"$2/etc/modules"
    done <<<"$paths"
}

# install_busybox ROOT: as /bin/busybox and /bin/sh.
install_busybox() {
    local path=$work/busybox/bin/busybox
    unpack busybox-static "$work/busybox"
    [[ -x $path ]] || path=$work/busybox/usr/bin/busybox
    cp "$path" "$1/bin/busybox"
    ln -s busybox "$1/bin/sh"
}

# pack_initramfs ROOT FILE [EXECUTABLE...]: the same tree gives the same bytes. Executables are named relative to ROOT.
pack_initramfs() {
    local root=$1 file=$2
    shift 2
    find "$root" -exec chmod u=rwX,go=rX {} +
    (cd "$root" && chmod 755 "$@")
    find "$root" -exec touch -h -d @0 {} +
    (cd "$root" && find . -print0 | sort -z | cpio --quiet --null -o -H newc --reproducible -R 0:0) | gzip -n9 >"$file"
}

make_key() {
    key=$arch-$(printf '%s\n' "${packages[@]/ /=}" "$sources_hash" | sha256sum | cut -c1-16)
}

up_to_date() {
    local one
    [[ $(readlink -f "$link") == "$out/.store/$key" ]] || return 1
    for one in "${results[@]}"; do
        [[ -s $link/$one ]] || return 1
    done
}

ask() {
    packages=()
    query
}

# The only steps that others can see. `mv -T` of a link is one rename(2).
publish() {
    {
        printf "%s $arch\n" "${packages[@]}"
        echo "edgehold-sources $sources_hash"
    } >"$result/manifest"
    chmod 644 "$result/manifest"
    mkdir -p "$out/.store"
    rm -rf "${out:?}/.store/$key"
    mv "$result" "$out/.store/$key"
    ln -s "$(realpath --relative-to="$(dirname "$link")" "$out/.store/$key")" "$work/link"
    mv -T "$work/link" "$link"
}

# What no key names any more. A QEMU that has already opened an old image keeps it.
drop_old() {
    local one deb wanted=()
    find "$out/.store" -mindepth 1 -maxdepth 1 -name "$arch-*" ! -name "$key" -exec rm -rf {} +
    for one in "${packages[@]}"; do
        # shellcheck disable=SC2086 # name and version, two words
        wanted+=("$(deb_path $one)")
    done
    for deb in "$out"/.cache/*_"$arch".deb; do
        [[ " ${wanted[*]} " == *" $deb "* ]] || rm -f "$deb"
    done
}

cached_build() {
    local one
    need apt-cache apt
    need sha256sum coreutils
    mkdir -p "$out" "$(dirname "$link")"
    out=$(cd "$out" && pwd -P)
    link=$(cd "$(dirname "$link")" && pwd -P)/$(basename "$link")
    sources_hash=$(sha256sum "${sources[@]}" | cut -c1-64 | sha256sum | cut -c1-64)

    if ask; then
        make_key
        if up_to_date; then
            say "up to date: $link (${packages[0]})"
            return
        fi
    elif grep -qsx "edgehold-sources $sources_hash" "$link/manifest"; then
        # Without package lists nobody can say that there is anything newer.
        say "apt has no package lists; keeping $link"
        return
    fi

    for one in "apt-get apt" "dpkg-deb dpkg" "flock util-linux" "${tools[@]}"; do
        # shellcheck disable=SC2086 # command and package, two words
        need $one
    done

    exec 9>"$out/.lock"
    if ! flock -n 9; then
        say "waiting for another build in $out"
        flock 9
    fi
    mkdir -p "$out/.cache"
    rm -rf "$out"/.work.* # of a build that was killed: we hold the lock
    work=$(mktemp -d "$out/.work.XXXXXX")
    trap 'rm -rf "$work"' EXIT

    if ! ask; then
        update_lists "no package lists"
        ask || die "apt does not know what is to be built for $arch"
    fi
    if ! fetch_all; then
        # Old lists name files that the archive no longer has.
        update_lists "the download failed, the lists may be old"
        ask || die "apt does not know what is to be built for $arch"
        fetch_all || die "the download failed twice"
    fi
    make_key
    if up_to_date; then # the build that we waited for
        say "up to date: $link (${packages[0]})"
        return
    fi
    result=$work/result
    mkdir "$result"
    say "building for ${packages[*]}"
    build
    publish
    drop_old
    say "built $link"
}
