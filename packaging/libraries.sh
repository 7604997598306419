#!/usr/bin/env bash
# What the extensions in package directories need of Debian's libraries, as shlibs:Depends: libraries.sh DIRECTORY...
#
# dpkg-shlibdeps asks the symbols files of installed libraries, and for packages of another architecture there are none.
# The names and versions that an ELF file asks for are in itself.
set -euo pipefail

die() {
    echo "libraries: $*" >&2
    exit 1
}

# newest_glibc: the newest of the symbol versions that readelf told of.
newest_glibc() {
    grep -oE "Name: GLIBC_[0-9.]+" <<<"$symbols" | sed 's/.*_//' | sort -V | tail -n 1
}

# unused PREFIX LIBRARY: nothing asks for a version of this library's symbols.
unused() {
    ! grep -qE "Name: $1_[0-9]" <<<"$symbols" || die "$2: which version of its package has what is used of it?"
}

for directory in "$@"; do
    needed='' symbols=''
    while read -r file; do
        needed+=$(readelf -dW "$file" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')$'\n'
        symbols+=$(readelf -VW "$file")$'\n'
    done < <(find "$directory" -name '*.so')
    [[ -n $symbols ]] || die "$directory: no extension"
    depends=()
    while read -r library; do
        case $library in
        '') ;;
        libc.so.6 | libm.so.6 | libpthread.so.0 | libdl.so.2 | librt.so.1 | ld-linux-*) depends+=("libc6 (>= $(newest_glibc))") ;;
        # Linked, but nothing of it used: any version will do.
        libgcc_s.so.1) unused GCC "$library" && depends+=(libgcc-s1) ;;
        libstdc++.so.6) unused GLIBCXX "$library" && depends+=(libstdc++6) ;;
        *) die "$directory: which package has $library?" ;;
        esac
    done <<<"$needed"
    package=${directory##*/}
    mapfile -t depends < <(printf '%s\n' "${depends[@]}" | sort -u)
    printf -v line '%s, ' "${depends[@]}"
    echo "libraries: $package: ${line%, }"
    echo "shlibs:Depends=${line%, }" >>"debian/$package.substvars"
done
