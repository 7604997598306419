#!/usr/bin/env bash
# Builds the Debian packages of a suite and architecture: build.sh [bookworm|trixie [amd64|arm64]]
#
# In: what git knows or would take of $inputs below, as it is in the working tree; wheels (packaging/wheelhouse.sh).
# Out: $BUILD/deb/SUITE/ARCH (build/deb/...): the packages and a manifest of their hashes. The same inputs give the same
# bytes, wherever they are and whoever builds (packaging/twice.sh tries it); the same inputs again are nothing to do.
# EDGEHOLD_VERSION=0.1.1 builds what the next version would be, for tests of upgrades.
#
# All is built on Debian 12, trixie's packages too: our extension takes Python's limited API and an old libc.
set -euo pipefail
umask 022
cd "$(dirname "${BASH_SOURCE[0]}")/.."
suite=${1:-bookworm}
arch=${2:-$(dpkg --print-architecture)}
inputs=(CHANGELOG.md LICENSE LICENSES daemons docs ext images/node/firstboot packaging sdk units)
python=$(pwd)/.venv/bin/python
mkdir -p "${BUILD:-build}/deb"
build=$(cd "${BUILD:-build}" && pwd -P)
out=$build/deb

say() { echo "deb: $*"; }
die() {
    echo "deb: $*" >&2
    exit 1
}
need() {
    command -v "$1" >/dev/null || die "'$1' is missing: install the Debian package $2"
}

case $suite in
bookworm) release=deb12u1 low=3.11 high=3.12 ;;
trixie) release=deb13u1 low=3.13 high=3.14 ;;
*) die "suites are bookworm and trixie, not '$suite'" ;;
esac
case $arch in
amd64) compiler=x86_64-linux-gnu-gcc package=gcc-x86-64-linux-gnu ;;
arm64) compiler=aarch64-linux-gnu-gcc package=gcc-aarch64-linux-gnu ;;
*) die "architectures are amd64 and arm64, not '$arch'" ;;
esac
need dh debhelper
need dpkg-buildpackage dpkg-dev
need "$compiler" "$package"
[[ -x $python ]] || die ".venv is missing: run 'make setup'"
version=${EDGEHOLD_VERSION:-$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)}
[[ $version =~ ^[0-9][0-9.]*$ ]] || die "'$version' is no version"
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}

# source_files: what belongs to the packages, NUL after each.
source_files() {
    local one
    git ls-files -z --cached --others --exclude-standard -- "${inputs[@]}" | sort -zu | while IFS= read -r -d '' one; do
        [[ ! -e $one ]] || printf '%s\0' "$one"
    done
}

changelog() {
    local title
    title=$(sed -n 's/^## //p' CHANGELOG.md | head -n 1)
    printf 'edgehold (%s) %s; urgency=medium\n\n' "$version~$release" "$suite"
    printf '  * %s.\n' "${title#Unreleased: }"
    printf '\n -- %s  %s\n' "$(sed -n 's/^Maintainer: //p' packaging/debian/control.in)" "$(date -uR -d "@$SOURCE_DATE_EPOCH")"
}

# copy_sources DIRECTORY: the tree that debhelper sees, with modes and times that do not depend on ours.
copy_sources() {
    mkdir -p "$1"
    source_files | tar -c --null -T - | tar -x -C "$1"
    find "$1" -type d -exec chmod 755 {} + -o -type f -perm /111 -exec chmod 755 {} + -o -type f -exec chmod 644 {} +
    find "$1" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
    cp -r "$1/packaging/debian" "$1/debian"
    changelog >"$1/debian/changelog"
    sed -e "s/@PYTHON@/$low/" -e "s/@PYTHON_NEXT@/$high/" "$1/debian/control.in" >"$1/debian/control"
    sed -i "s/^__version__ = .*/__version__ = \"$version\"/" "$1/sdk/edgehold/__init__.py"
}

export BUILD=$build
packaging/wheelhouse.sh "$suite" "$arch"
packaging/headers.sh "$arch"
link=$out/$suite/$arch
mkdir -p "$out/$suite" "$out/.store"
exec 9>"$out/.lock"
flock 9
rm -rf "$out"/.work.* # of a build that was killed: we hold the lock
work=$(mktemp -d "$out/.work.XXXXXX")
trap 'rm -rf "$work"' EXIT
# The key is of the copy: what is edited while we build belongs to the next build.
copy_sources "$work/edgehold"
key=$(
    cd "$work/edgehold"
    {
        "$compiler" --version
        dpkg-query -W debhelper dpkg-dev "$package" 2>/dev/null || true
        readlink "$build/headers/$arch"
        find . -type f -print0 | sort -z | xargs -0 sha256sum
    } | sha256sum | cut -c1-16
)
store=$out/.store/$suite-$arch-$key
if [[ $(readlink -f "$link") == "$store" && -s $link/manifest ]]; then
    say "up to date: $link ($version~$release)"
    exit 0
fi

say "building $version~$release for $arch"
ln -s "$build/wheels/$suite-$arch" "$work/edgehold/wheels"
ln -s "$build/headers/$arch/usr/include" "$work/edgehold/headers"
# Only what a build needs: settings of whoever builds must not reach the bytes.
(
    cd "$work/edgehold"
    env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/nonexistent LC_ALL=C.UTF-8 TZ=UTC SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" \
        DEB_BUILD_OPTIONS=noautodbgsym EDGEHOLD_DIST="$suite" EDGEHOLD_PYTHON="$python" \
        dpkg-buildpackage -a"$arch" -b -us -uc -d --no-check-builddeps
) >"$work/log" 2>&1 9>&- || { tail -n 40 "$work/log" >&2 && die "the build failed"; }
grep '^libraries:' "$work/log"
mkdir "$work/result"
mv "$work"/*.deb "$work/result/"
(cd "$work/result" && sha256sum -- *.deb >"$work/manifest" && mv "$work/manifest" manifest)
rm -rf "$store"
mv "$work/result" "$store"
ln -s "$(realpath --relative-to="$(dirname "$link")" "$store")" "$work/link"
mv -T "$work/link" "$link"
find "$out/.store" -mindepth 1 -maxdepth 1 -name "$suite-$arch-*" ! -name "${store##*/}" -exec rm -rf {} +
say "built $link"
