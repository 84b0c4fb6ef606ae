# Every target sets .venv up where it is missing or older than the requirements.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip
# One thread a process, since pytest runs two processes; no test needs the Hub.
QUIET := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
FAST := tests/diffusion tests/data tests/models tests/runs tests/test_config.py
BENCHMARKS := scheduler sampling guidance training growth muon

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train app test test-fast lint format mutants bench constraints

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' $(MAKEFILE_LIST) \
	    | awk -F'|' '{printf "%-20s%s\n", $$1, $$2}'

setup: .venv/.dev  ## create .venv with everything that training, tests and lint need

train: .venv/.runtime  ## train on emoji; ARGS="--config configs/emoji.yaml" picks another run
	$(BIN)/python train_text2img.py $(ARGS)

app: .venv/.runtime  ## serve the demo
	$(BIN)/python app.py $(ARGS)

test: .venv/.dev  ## run all tests in random order; ARGS="-p no:randomly tests/hub" picks some
	$(QUIET) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: .venv/.dev  ## run the fast tests, in under a minute
	$(QUIET) $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(FAST) $(ARGS)

lint: .venv/.dev  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/.dev  ## format the code and apply the fixes that ruff is sure of
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Takes hours; ARGS="pipeline.diffusion.guidance*" takes one module, `mutmut show NAME` one mutant.
define SCORE
import json
count = json.load(open("mutants/mutmut-cicd-stats.json"))
found = count["killed"] + count["timeout"] + count["segfault"] + count["suspicious"]
tried = found + count["survived"] + count["no_tests"]
print(f"mutation score: {found} of {tried} ({found / tried:.1%})")
endef
export SCORE

mutants: .venv/.dev  ## break pipeline/diffusion/ on purpose, count what the tests notice
	$(QUIET) $(BIN)/mutmut run $(ARGS)
	$(BIN)/mutmut results
	$(BIN)/mutmut export-cicd-stats
	@$(BIN)/python -c "$$SCORE"

# Needs a quiet machine. The ladder takes hours and runs alone: $(BIN)/python benchmarks/ladder.py
bench: .venv/.dev  ## rewrite the sections of docs/benchmarks.md that take minutes
	for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py $(ARGS) || exit 1; done

# CUDA's own packages depend on the machine, and torch pins them itself.
constraints: .venv/.dev  ## rewrite constraints.txt from the versions in .venv
	sed '/^[^#]/d' constraints.txt > constraints.new
	$(PIP) freeze --all --exclude pip --exclude direct-jump | sed '/ @ /d; /^-e/d; s/+.*//' \
	    | grep -viE '^(nvidia|cuda|triton)' >> constraints.new
	mv constraints.new constraints.txt

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: $(PYTHON) is Python " \
	    + sys.version.split()[0] + ", expected 3.11 or newer: make PYTHON=python3.12, say")'
	$(PYTHON) -m venv .venv

# The package itself is editable, for the command direct-jump and the scripts in examples/.
.venv/.runtime: requirements.txt constraints.txt pyproject.toml | .venv/bin/python
	$(PIP) install --quiet -c constraints.txt -r requirements.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

.venv/.dev: requirements-dev.txt .venv/.runtime
	$(PIP) install --quiet -c constraints.txt -r requirements-dev.txt
	touch $@
