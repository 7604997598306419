# shellcheck shell=bash
# shellcheck disable=SC2034 # the scripts that source this read these variables
# Which wheels a suite's packages take. Sourced, never run.

# pip_platform SUITE ARCH: sets `platform`, pip's options for wheels that run on this suite and architecture.
# Debian 12 has glibc 2.36: what asks for at most 2.28 runs on both.
pip_platform() {
    local machine version
    case $2 in
    amd64) machine=x86_64 ;;
    arm64) machine=aarch64 ;;
    *) return 1 ;;
    esac
    case $1 in
    bookworm) version=3.11 ;;
    trixie) version=3.13 ;;
    *) return 1 ;;
    esac
    platform=(
        --platform "manylinux2014_$machine" --platform "manylinux_2_17_$machine" --platform "manylinux_2_28_$machine"
        --python-version "$version" --implementation cp --abi "cp${version/./}" --abi abi3 --abi none
        --only-binary=:all: --no-deps --disable-pip-version-check --quiet
    )
}
