# Edgehold: what a person types. `make` alone says what there is.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GUEST := build/guest/amd64/initramfs.gz
# What each step needs from Debian: compiling the extension and the guest's job, running guests, linting scripts.
APT_BUILD := gcc libc6-dev python3-dev python3-venv cpio kmod
APT_RUN := qemu-system-x86
APT_LINT := shellcheck
SOURCES := ext/build_kernel.py $(wildcard ext/*.c ext/*.h)

.DEFAULT_GOAL := help
.PHONY: help demo test test-unit test-integration lint fmt bench ext guest setup clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

demo: setup guest ## boot a guest whose vCPU's reservation sizes itself; writes build/demo/report.html
	$(BIN)/python -m demo

test: setup guest lint test-unit test-integration ## everything that CI runs

test-unit: setup ## seconds, no root, no guest
	$(BIN)/python -m pytest tests/unit tests/repo

test-integration: setup guest ## real kernel, real QEMU; needs root
	EDGEHOLD_REQUIRE=$${EDGEHOLD_REQUIRE-1} $(BIN)/python -m pytest tests/integration

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

bench: setup ## what calls and imports cost, as a table and build/bench/*.json
	$(BIN)/python -m tests.bench

ext: setup ## compile the extension (a part of set-up)

guest: $(GUEST) ## build the small guest from Debian's kernel and busybox

setup: build/.venv ## virtual environment, Debian packages and the extension

build/.apt-build: Makefile
	@tools/apt-need $(APT_BUILD) $(APT_RUN)
	@mkdir -p build && touch $@

build/.apt-lint: Makefile
	@tools/apt-need $(APT_LINT)
	@mkdir -p build && touch $@

build/.venv: pyproject.toml constraints.txt setup.py $(SOURCES) | build/.apt-build
	@echo "set-up: virtual environment $(VENV), its packages and the extension"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --upgrade 'pip>=25.1' -c constraints.txt
	@$(BIN)/python -m pip install -q -c constraints.txt --group dev -e '.[all]'
	@touch $@

build/.apt-build build/.venv: | build
build:
	@mkdir -p build

$(GUEST): $(wildcard images/guest/*) | build/.apt-build
	@images/guest/build.sh
	@touch $@

clean: ## remove what was built (not the downloads of the guest)
	rm -rf $(VENV) build/.venv build/.apt-* build/demo build/bench ext/_build sdk/edgehold/_kernel*.so edgehold.egg-info sdk/*.egg-info
