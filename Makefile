# make train | app | test | lint | mutants | bench: each sets up .venv by itself where it is missing or older than its
# requirements.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train app test lint mutants bench
.DELETE_ON_ERROR:

train: .venv/.runtime
	$(BIN)/python train_text2img.py $(ARGS)

app: .venv/.runtime
	$(BIN)/python app.py $(ARGS)

# Two at a time, a thread each: most of their time is the start of processes.
test: .venv/.dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/.dev
	$(BIN)/ruff check .

mutants: .venv/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python tests/mutants.py

# On a quiet machine. The ladder takes hours and is not among them: $(BIN)/python benchmarks/ladder.py
bench: .venv/.dev
	for name in scheduler sampling guidance training growth muon; do $(BIN)/python benchmarks/$$name.py $(ARGS) || exit 1; done

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: $(PYTHON) is Python " + sys.version.split()[0] + \
	    ", expected 3.11 or newer: make PYTHON=python3.12, say")'
	$(PYTHON) -m venv .venv

.venv/.runtime: requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install -r requirements.txt
	touch $@

.venv/.dev: requirements-dev.txt requirements.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@ .venv/.runtime
