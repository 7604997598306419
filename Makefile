# Edgehold: what a person types. `make` alone says what there is.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GUESTS := build/guest/amd64/initramfs.gz build/guest/arm64/initramfs.gz
TESTKERNELS := build/testkernel/initramfs.gz build/testkernel-6.12/initramfs.gz
TRIXIE := build/trixie/manifest
# Of packages and images: which Debian, which architecture.
DIST ?= bookworm
ARCH ?= $(shell dpkg --print-architecture)
OWN := $(shell dpkg --print-architecture)
# What each step needs from Debian: compiling the extension, the guests' programs and test modules; running guests;
# linting scripts and units; libvirt's clients, which tests of virtvmand are; the daemon that the benchmarks compare
# with; what loads the host and watches deadlined in its benchmarks; building packages; machines with systemd as PID 1;
# root file systems and disks of any architecture, and the firmware that boots them.
APT_BUILD := gcc libc6-dev gcc-aarch64-linux-gnu libc6-dev-arm64-cross python3-dev python3-venv cpio kmod libelf1 xz-utils
APT_RUN := qemu-system-x86 qemu-system-arm qemu-utils device-tree-compiler iproute2
APT_LINT := shellcheck groff-base mandoc systemd
APT_CLIENTS := libvirt-clients python3-libvirt libxml2-utils
APT_PEER := libvirt-daemon-system $(APT_CLIENTS)
APT_BENCH := gcc libc6-dev stress-ng strace
APT_DEB := debhelper dpkg-dev gcc gcc-aarch64-linux-gnu lintian
APT_SYSTEM := debootstrap systemd-container util-linux
APT_IMAGE := mmdebstrap arch-test qemu-user-static e2fsprogs dosfstools mtools fdisk zstd systemd
APT_VM := $(APT_IMAGE) qemu-system-x86 qemu-system-arm ovmf qemu-efi-aarch64
SOURCES := ext/build_kernel.py $(wildcard ext/*.c ext/*.h ext/uapi/*.h)

.DEFAULT_GOAL := help
.PHONY: help demo experiment test test-unit test-integration test-install test-system test-vm deb deb-all deb-lint deb-twice image lint fmt bench bench-peer bench-isolation bench-libvirt bench-deadline bench-safety bench-deadline-guest test-libvirt-trixie ext guest testkernel setup clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

demo: setup build/guest/amd64/initramfs.gz ## boot a guest whose vCPU's reservation sizes itself; writes build/demo/report.html
	$(BIN)/python -m demo

experiment: setup ## budgets that size themselves, both rules (three minutes); writes build/experiment/report.html; needs root
	$(BIN)/python -m experiment

test: setup guest testkernel build/.apt-peer lint test-unit test-integration test-install ## everything that CI runs

test-unit: setup ## seconds, no root, no guest
	$(BIN)/python -m pytest tests/unit tests/repo

test-integration: setup guest testkernel build/.apt-peer ## real kernel, real QEMU; needs root
	EDGEHOLD_REQUIRE=$${EDGEHOLD_REQUIRE-1} $(BIN)/python -m pytest tests/integration

test-install: deb-system-bookworm ## the packages on Debian 12 with systemd as PID 1, what matters most; needs root
	EDGEHOLD_REQUIRE=$${EDGEHOLD_REQUIRE-1} EDGEHOLD_SUITES=bookworm \
	  $(BIN)/python -m pytest tests/system/test_install.py tests/system/test_lifecycle.py

test-system: deb-system-bookworm deb-system-trixie ## the packages on Debian 12 and 13 with systemd as PID 1 (20 minutes); needs root
	EDGEHOLD_REQUIRE=$${EDGEHOLD_REQUIRE-1} $(BIN)/python -m pytest tests/system -m 'not slow'

test-vm: setup guest testkernel build/.apt-vm ## packages and node images in whole machines, amd64 and arm64, under emulation (an hour); needs root
	$(MAKE) deb ARCH=amd64 && $(MAKE) deb ARCH=arm64
	$(MAKE) image ARCH=amd64 && $(MAKE) image ARCH=arm64
	EDGEHOLD_REQUIRE=$${EDGEHOLD_REQUIRE-1} $(BIN)/python -m pytest tests/system -m slow

.PHONY: deb-system-bookworm deb-system-trixie
deb-system-bookworm deb-system-trixie: deb-system-%: setup guest build/.apt-deb build/.apt-system
	@packaging/build.sh $* $(OWN)
	@images/system/build.sh $*

test-libvirt-trixie: setup guest $(TRIXIE) ## virtvmand under Debian 13's virsh (downloads about 30 MB); needs root
	EDGEHOLD_REQUIRE=$${EDGEHOLD_REQUIRE-1} EDGEHOLD_VIRSH="$$(printf '%q virsh' "$$PWD/images/trixie/run.sh")" \
	  $(BIN)/python -m pytest tests/integration/test_virtvmand_virsh.py

lint: setup build/.apt-lint ## ruff, mypy strict, import contracts, codespell, shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell
	shellcheck $$(git ls-files '*.sh' .ci/run tools)

fmt: setup ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup guest ## what calls, imports and partitions cost, as a table and build/bench/*.json
	$(BIN)/python -m tests.bench

bench-peer: setup guest build/.apt-peer ## the same beside libvirt on this machine; needs root
	$(BIN)/python -m tests.bench.peer

bench-isolation: setup guest ## a partition's job while another one attacks; needs root and a quiet machine
	$(BIN)/python -m tests.bench.isolation

bench-libvirt: setup guest build/.apt-peer ## virtvmand beside libvirtd: calls, CPU and memory; needs root
	$(BIN)/python -m tests.bench.virt

bench-deadline: setup build/.apt-bench ## what deadlined costs and how steady it is (40 minutes); needs root and a quiet machine
	$(BIN)/python -m tests.bench.deadline

bench-safety: setup ## what deadlined leaves behind after 1,000 detaches, 500 throttled hogs, 50 kills; needs root
	$(BIN)/python -m tests.bench.safety

bench-deadline-guest: setup build/guest/amd64/initramfs.gz ## a guest's missed deadlines beside hogs, held and not held; needs root
	$(BIN)/python -m tests.bench.guestjob

deb: setup build/.apt-deb ## Debian packages in build/deb/DIST/ARCH; DIST=bookworm|trixie ARCH=amd64|arm64
	@packaging/build.sh $(DIST) $(ARCH)

deb-lint: build/.apt-deb build/.apt-image ## each suite's own lintian over the packages that are built
	@for one in build/deb/*/; do packaging/lintian.sh "$$(basename "$$one")" || exit; done

deb-twice: deb ## build them once more, elsewhere and under other circumstances: the same bytes?
	@packaging/twice.sh $(DIST) $(ARCH)

deb-all: ## the packages for both suites and architectures, and lintian over them
	@export SOURCE_DATE_EPOCH="$$(git log -1 --format=%ct)"; for dist in bookworm trixie; do for arch in amd64 arm64; do \
	  $(MAKE) --no-print-directory deb DIST=$$dist ARCH=$$arch || exit; done; done
	@$(MAKE) --no-print-directory deb-lint

image: deb build/.apt-image ## a node's disk image in build/image, and how it boots: docs/node-image.md; DIST= ARCH=
	@ARCH=$(ARCH) DIST=$(DIST) images/node/build.sh

ext: setup ## compile the extension (a part of set-up)

guest: $(GUESTS) ## build the small guests from Debian's kernels and busybox

testkernel: $(TESTKERNELS) ## build what tests boot to run under other kernels (downloads about 200 MB)

setup: build/.venv ## virtual environment, Debian packages and the extension

build/.apt-build: Makefile
	@tools/apt-need $(APT_BUILD) $(APT_RUN)
	@mkdir -p build && touch $@

build/.apt-lint: Makefile
	@tools/apt-need $(APT_LINT)
	@mkdir -p build && touch $@

build/.apt-peer: Makefile
	@tools/apt-need $(APT_PEER)
	@mkdir -p build && touch $@

build/.apt-bench: Makefile
	@tools/apt-need $(APT_BENCH)
	@mkdir -p build && touch $@

build/.venv: pyproject.toml constraints.txt setup.py $(SOURCES) | build/.apt-build
	@echo "set-up: virtual environment $(VENV), its packages and the extension"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --upgrade 'pip>=25.1' -c constraints.txt
	@$(BIN)/python -m pip install -q -c constraints.txt --group dev -e '.[all]'
	@touch $@

build/.apt-deb: Makefile
	@tools/apt-need $(APT_DEB)
	@mkdir -p build && touch $@

build/.apt-system: Makefile
	@tools/apt-need $(APT_SYSTEM)
	@mkdir -p build && touch $@

build/.apt-image: Makefile
	@tools/apt-need $(APT_IMAGE)
	@mkdir -p build && touch $@

build/.apt-vm: Makefile
	@tools/apt-need $(APT_VM)
	@mkdir -p build && touch $@

build/.apt-build build/.venv: | build
build:
	@mkdir -p build

$(GUESTS): build/guest/%/initramfs.gz: $(wildcard images/guest/*) images/apt.sh | build/.apt-build
	@ARCH=$* images/guest/build.sh
	@touch $@

$(TESTKERNELS): $(wildcard images/testkernel/*) images/apt.sh images/suite.sh | build/.apt-build
	@KERNEL=$(if $(findstring 6.12,$@),6.12,6.1) images/testkernel/build.sh
	@touch $@

$(TRIXIE): $(wildcard images/trixie/*) images/apt.sh images/suite.sh | build/.apt-build
	@images/trixie/build.sh
	@touch $@

clean: ## remove what was built (not what images/ built and downloaded)
	rm -rf $(VENV) build/.venv build/.apt-* build/demo build/experiment build/bench ext/_build sdk/edgehold/_kernel*.so edgehold.egg-info sdk/*.egg-info
