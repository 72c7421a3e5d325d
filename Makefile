# Everything a fresh machine needs: `make demo` to see it work, `make test` to check it.
# Which Python and where to: make test PYTHON=python3.13 VENV=.venv313
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := runs/demo
TORCH211 ?= .venv-torch211
# Tests that run at the same time; those of a file stay together, since they share what they set up.
JOBS ?= 2
CHROMIUM := /usr/bin/chromium
# Tests of what depends on torch's and triton's versions.
COMPUTING := tests/kernels tests/fake_cuda tests/models tests/attacks tests/training tests/evaluation/test_measure.py \
  tests/system/test_distributed.py tests/system/test_precision.py tests/runs/test_resume.py tests/runs/test_lifecycle.py \
  tests/runs/test_trainer.py tests/bench/test_peaks.py

.PHONY: help install setup-ffcv setup-chromium native demo test test-slow test-torch211 lint docs hooks clean

help:
	@echo "make demo       train, distil and attack on the embedded data set, in minutes on a CPU"
	@echo "make test       lint, types and tests"
	@echo "make test-slow  the tests that take minutes each"
	@echo "make test-torch211  those of what computes, with the oldest torch and triton that are supported"
	@echo "make lint       ruff and mypy alone"
	@echo "make docs       the documentation as a site in build/site"
	@echo "make hooks      ruff and mypy before each commit"
	@echo "make install    the virtual environment $(VENV) with the engine in it"
	@echo "make setup-ffcv FFCV in it, with the system's packages that its build needs"
	@echo "make setup-chromium  a browser for the tests of the HTML report"
	@echo "make native     the native library alone, which make install builds where it can"
	@echo "make clean      remove what make made"

install: $(VENV)/.installed

# Without CMake or a compiler this installs all the same, and the ops are served by torch.
$(VENV)/.installed: setup.py pyproject.toml constraints.txt CMakeLists.txt $(wildcard kernels/csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@# An independent reference for attacks; it pins old versions of packages that it does not need here.
	$(BIN)/pip install --quiet --no-deps torchattacks==3.5.1
	@touch $@

# FFCV is built where it is installed. Names of other systems' packages stand in docs/data.md.
FFCV_NEEDS := g++ pkg-config libopencv-dev libturbojpeg0-dev
setup-ffcv: $(VENV)/.installed
	@if ! pkg-config --exists opencv4 libturbojpeg; then \
	  if [ "$$(id -u)" = 0 ]; then root=; elif sudo -n true 2>/dev/null; then root=sudo; else \
	    echo "setup-ffcv: as root run: apt-get install $(FFCV_NEEDS)" >&2; exit 1; fi; \
	  $$root apt-get update -q && \
	  DEBIAN_FRONTEND=noninteractive $$root apt-get install -qy --no-install-recommends $(FFCV_NEEDS); fi
	$(BIN)/pip install --quiet --use-pep517 --constraint constraints.txt --editable '.[ffcv]'

# A browser for the tests of the HTML report.
setup-chromium:
	@if [ ! -x "$(CHROMIUM)" ]; then \
	  if [ "$$(id -u)" = 0 ]; then root=; elif sudo -n true 2>/dev/null; then root=sudo; else \
	    echo "setup-chromium: as root run: apt-get install chromium" >&2; exit 1; fi; \
	  $$root apt-get update -q && \
	  DEBIAN_FRONTEND=noninteractive $$root apt-get install -qy --no-install-recommends chromium; fi
	@test -x "$(CHROMIUM)"

# What cannot be installed here is told, and its tests are skipped.
$(VENV)/.installed-loaders: $(VENV)/.installed-dev
	$(MAKE) setup-ffcv || echo "FFCV cannot be installed here: its tests are skipped"
	$(MAKE) setup-chromium || echo "Chromium cannot be installed here: the tests in a browser are skipped"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dali]' || \
	  echo "DALI cannot be installed here: its tests are skipped"
	@touch $@

native:
	cmake -S . -B build/native
	cmake --build build/native --parallel
	cmake --install build/native --prefix build/native/installed
	@# Renamed into its place: half a library would kill the process that loads it.
	cp build/native/installed/engine/kernels/_native.so kernels/_native.so.part
	mv kernels/_native.so.part kernels/_native.so

# The teacher is trained anew in each demo: it gets a cache of its own.
demo: install
	rm -rf $(DEMO)
	ENGINE_CACHE=$(DEMO)/cache $(BIN)/engine train --config examples/demo.yaml --out $(DEMO)
	$(BIN)/engine eval $(DEMO)/teacher $(DEMO) --attacks natural,fgsm,pgd20,cw,aa --limit-aa 20
	@echo "Everything it wrote:"
	@find $(DEMO) -type f -not -path '*/tensorboard/*' | sort

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# From docs/, README.md and the docstrings; a link that leads nowhere is an error.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

hooks: $(VENV)/.installed-dev
	$(BIN)/pre-commit install

# Triton's interpreter takes a process of its own: the variable is read when triton is imported.
test: $(VENV)/.installed-loaders lint
	$(BIN)/pytest -n $(JOBS) --dist loadfile -m "not slow and not gpu" --ignore tests/interpreter
	TRITON_INTERPRET=1 $(BIN)/pytest -n $(JOBS) tests/interpreter

test-slow: $(VENV)/.installed-loaders
	$(BIN)/pytest -m slow

# The oldest torch that is supported, and the triton that came with it.
$(TORCH211)/.installed: setup.py pyproject.toml CMakeLists.txt $(wildcard kernels/csrc/*)
	$(PYTHON) -m venv $(TORCH211)
	$(TORCH211)/bin/pip install --quiet torch==2.11.0 torchvision==0.26.0 --editable '.[test]'
	@touch $@

test-torch211: $(TORCH211)/.installed
	$(TORCH211)/bin/pytest -m "not slow and not gpu" $(COMPUTING)
	TRITON_INTERPRET=1 $(TORCH211)/bin/pytest tests/interpreter

clean:
	rm -rf $(VENV) $(TORCH211) $(DEMO) build dist *.egg-info kernels/_native.so .mypy_cache .pytest_cache .ruff_cache .hypothesis
