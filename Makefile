# One environment for everything: .venv, made on first use. Everything is installed by name, with
# the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
GREEDYPRUNE_WERROR ?= OFF
export GREEDYPRUNE_WERROR
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cuda/*.cu csrc/cuda/*.h) \
  CMakeLists.txt setup.py pyproject.toml

CXX_FILES := $(filter %.h %.cpp %.cu,$(SOURCES)) $(wildcard benchmarks/*.cpp tests/emulated/*.h tests/emulated/*.cpp)

.PHONY: help test test-all demo docs lint format bench bench-quick coverage gpu-check clean install

help:  ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/installed: $(SOURCES) constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs,examples]'
	touch $@

install: .venv/installed  ## .venv with the package (editable) and what developing it needs

test: .venv/installed  ## the tests but for the longest, in a process for each processor
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadgroup -m "not slow"

test-all: .venv/installed  ## the whole test suite
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadgroup

demo: .venv/installed  ## train, prune and fine-tune on digits: a table and out/digits_mlp.png
	$(BIN)/python examples/digits_mlp.py

docs: .venv/installed  ## the documentation site, strictly: out/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: .venv/installed  ## formatting, ruff, mypy, the order of imports, clang-format
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: .venv/installed  ## rewrite the sources as lint wants them
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

bench: .venv/installed  ## benchmarks against plain torch: benchmarks/RESULTS.md, about half an hour
	rm -rf out/bench && mkdir -p out/bench
	for file in benchmarks/test_*.py; do $(BIN)/python -m pytest $$file --benchmark-only \
	  --benchmark-quiet --benchmark-json=out/bench/$$(basename $$file .py).json || exit 1; done
	$(BIN)/python benchmarks/report.py out/bench/*.json

gpu-check:  ## tests, compute-sanitizer and benchmarks on a GPU, in under 9 minutes: out/gpu
	benchmarks/gpu_check.sh out/gpu

bench-quick: .venv/installed  ## every benchmark once, at tiny sizes: out/bench-quick/RESULTS.md
	mkdir -p out
	$(BIN)/python -m pytest benchmarks --benchmark-only --quick --benchmark-quiet --benchmark-json=out/bench-quick.json
	$(BIN)/python benchmarks/report.py out/bench-quick.json --out out/bench-quick

coverage: .venv/installed  ## public architectures, over an hour: docs/coverage.md
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[coverage]'
	$(BIN)/python benchmarks/coverage.py

clean:  ## remove what the other targets made
	rm -rf .venv build dist out *.egg-info greedyprune/_C*.so
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
