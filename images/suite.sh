# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154 # the script that sources this sets and reads these variables
# Packages of another Debian than the host's, by an apt of our own. Sourced after images/apt.sh, never run.
#
# A script that has set suite, arch and out calls `own_apt` before `cached_build`, and `write_sources` first in its
# query. The host's lists, packages and preferences are neither used nor changed.
# From where: the mirror that the host's own apt sources have for Debian, or TRIXIE_MIRROR=URI; signed by Debian's keys.

keys=/usr/share/keyrings/debian-archive-keyring.gpg

own_apt() {
    mkdir -p "$out"/.apt/{lists/partial,cache/archives/partial}
    own=$(cd "$out/.apt" && pwd -P)
    : >"$own/status"
    apt_options=(
        -o "APT::Architecture=$arch" -o "APT::Architectures::=$arch" -o "APT::Sandbox::User=$(id -un)"
        -o "Dir::Etc::sourcelist=$own/sources.list" -o "Dir::Etc::sourceparts=/dev/null"
        -o "Dir::Etc::preferences=/dev/null" -o "Dir::Etc::preferencesparts=/dev/null"
        -o "Dir::State::Lists=$own/lists" -o "Dir::State::status=$own/status" -o "Dir::Cache=$own/cache"
        # Some hosts switch it off, and apt is asked twice.
        -o "Dir::Cache::pkgcache=pkgcache.bin"
    )
}

# mirror: prints the first mirror of Debian itself. apt reads its sources, so each of their formats will do.
mirror() {
    if [[ -n ${TRIXIE_MIRROR:-} ]]; then
        echo "$TRIXIE_MIRROR"
        return
    fi
    # shellcheck disable=SC2016 # apt-get expands it
    apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
        awk -F'|' '$1 == "Debian" && $2 == "Debian" && !found { print $3; found = 1 }'
}

# write_sources: false if there is no mirror.
write_sources() {
    local uri signed=
    uri=$(mirror)
    [[ -n $uri ]] || return 1
    [[ ! -e $keys ]] || signed="[signed-by=$keys] "
    echo "deb ${signed}$uri $suite main" >"$own/sources.list"
}

update_lists() {
    say "apt-get update ($1)"
    if ! write_sources; then
        # Only lists that were fetched tell whose they are.
        [[ $(id -u) -ne 0 ]] || apt-get -q update >&2 || say "apt-get update reported errors"
        write_sources || die "apt knows no mirror of Debian: run 'apt-get update' as root if the host's apt sources" \
            "have one, else name one: TRIXIE_MIRROR=URI"
    fi
    apt-get "${apt_options[@]}" -q update >&2 || die "apt-get update failed for $suite of $(mirror): where the mirror" \
        "has no $suite, name one that has: TRIXIE_MIRROR=URI; where a key is missing, install debian-archive-keyring"
}
