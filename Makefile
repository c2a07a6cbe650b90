# make demo    from a fresh checkout to a video: .venv, this checkout as a wheel, one prompt streamed for four seconds
# make test    the same environment plus PyTorch and the test extra, then pytest
#
# Everything lives in .venv and build/. Running a target again does only what changed sources, pins or options ask for.
#   PYTHON=python3.12   another Python        CFRT_CUDA=ON|OFF|AUTO   CUDA kernels (AUTO: when nvcc is found)
#   TORCH_INDEX=URL     where torch comes from                         CFRT_CUDA_ARCHS=89     for these alone, not all
#   ARGS="-k ring"      further arguments for pytest

PYTHON ?=
TORCH_INDEX ?= auto
CFRT_CUDA ?= AUTO
ARGS ?=
PROMPT ?= a large red circle moving left over the ocean

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
export TORCH_INDEX CFRT_CUDA
unexport PYTHONPATH
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
STAMPS := $(VENV)/.stamps
SOURCES := pyproject.toml CMakeLists.txt README.md LICENSE cmake csrc cfrt training export
CXX_SOURCES := csrc/*.h csrc/*.cpp csrc/cpu/*.* csrc/cpu/kernels/* csrc/cuda/* tests/ptxsim/*/*.h tests/ptxsim/*/*.cpp tests/native/*.h tests/native/*.cpp tests/*.cpp
WHEEL = $$(echo build/wheel/cfrt-*.whl)

.PHONY: help demo test test-all test-ray lint format types imports bench gate compare readme dev clean FORCE

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

# ------------------------------------------------------------------------------------------------------------ environment

$(STAMPS)/venv:
	@python=$$(tools/prerequisites.sh $(PYTHON)); set -x; "$$python" -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/torch: $(STAMPS)/venv constraints.txt tools/torch.sh
	tools/torch.sh $(PIP)
	@touch $@

$(STAMPS)/build: $(STAMPS)/venv $(STAMPS)/cuda constraints.txt pyproject.toml tools/build_requirements.py
	$(BIN)/python tools/build_requirements.py > $@.txt && $(PIP) install -c constraints.txt -r $@.txt
	$(BIN)/python tools/build_requirements.py --dynamic > $@.txt && $(PIP) install -c constraints.txt -r $@.txt
	@touch $@

# Files whose content is a setting: rewritten, and so newer, only when the setting changes.
$(STAMPS)/cuda: FORCE | $(STAMPS)/venv
	@echo '$(CFRT_CUDA) $(CFRT_CUDA_ARCHS)' | cmp -s - $@ || echo '$(CFRT_CUDA) $(CFRT_CUDA_ARCHS)' > $@

$(STAMPS)/sources: FORCE | $(STAMPS)/venv
	@find $(SOURCES) -type f -not -path '*/__pycache__/*' -not -name '.*' -print0 | sort -z | xargs -0 sha256sum > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(STAMPS)/wheel: $(STAMPS)/sources $(STAMPS)/build
	@rm -rf build/wheel
	$(PIP) wheel . -v --no-deps --no-build-isolation -w build/wheel
	@touch $@

$(STAMPS)/installed: $(STAMPS)/wheel
	$(PIP) install --no-deps --force-reinstall $(WHEEL)
	$(PIP) install -c constraints.txt $(WHEEL)
	@touch $@

$(STAMPS)/test: $(STAMPS)/installed $(STAMPS)/torch
	$(PIP) install -c constraints.txt "$(WHEEL)[test]"
	@touch $@

$(STAMPS)/bench: $(STAMPS)/test
	$(PIP) install -c constraints.txt "$(WHEEL)[bench]"
	@touch $@

$(STAMPS)/dev: $(STAMPS)/test
	$(PIP) install -c constraints.txt "$(WHEEL)[dev]"
	@touch $@

# ------------------------------------------------------------------------------------------------------------------- work

demo: $(STAMPS)/installed
	$(BIN)/cfrt generate "$(PROMPT)" --seconds 4 -o demo.mp4 -o demo.png

test: $(STAMPS)/test
	CFRT_WHEEL="$(CURDIR)/$(WHEEL)" $(BIN)/pytest -m "not slow" $(ARGS)

test-all: $(STAMPS)/test
	CFRT_WHEEL="$(CURDIR)/$(WHEEL)" $(BIN)/pytest $(ARGS)

# Two replicas of the server on this machine. Ray and what it brings are some 350 MB, so that no other target asks for it.
test-ray: $(STAMPS)/test
	$(PIP) install -c constraints.txt "$(WHEEL)[ray]"
	CFRT_RAY=1 $(BIN)/pytest -m ray $(ARGS)

lint: $(STAMPS)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(STAMPS)/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_SOURCES)

types: $(STAMPS)/dev
	$(BIN)/mypy
	MYPYPATH=csrc $(BIN)/stubtest _cfrt

imports: $(STAMPS)/test
	$(BIN)/lint-imports

bench: $(STAMPS)/bench
	$(BIN)/pytest benchmarks $(ARGS)

# Ratios and times that must not get worse: benchmarks/gates.json.
gate: $(STAMPS)/test
	$(BIN)/python -m benchmarks.gate $(ARGS)

# The native engine beside other runtimes, measured anew, ten minutes on an idle machine; `make readme` words it.
compare: $(STAMPS)/bench
	$(BIN)/python -m benchmarks.bench_cpu --json benchmarks/results/cpu.json

# The README's example output, picture, charts and tables of speed; that of the stream measured anew.
readme: $(STAMPS)/bench
	$(BIN)/pytest benchmarks/bench_stream.py --benchmark-json build/bench.json
	$(BIN)/python tools/readme.py --bench build/bench.json

# An editable install: Python sources run from the checkout, the extension is built once.
dev: $(STAMPS)/dev
	$(PIP) install --no-deps --no-build-isolation -e .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
