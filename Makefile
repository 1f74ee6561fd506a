# `make demo` and `make test` do all the set-up themselves on a machine that has Python 3.11+, git and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# One thread per worker: the workflow runs several processes side by side, and thread pools of their own only collide.
export OMP_NUM_THREADS ?= 1

.PHONY: help install demo test lint unit clean
.DEFAULT_GOAL := help

help:
	@echo "make install   put the pinned packages and cellmap_pipe into $(VENV)"
	@echo "make demo      make a synthetic challenge, train, predict, score and report on it, all in demo/ (a few minutes)"
	@echo "make test      check style and types, run every test, the demo and the real data included"
	@echo "make clean     remove demo/ and caches; $(VENV) stays"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@echo "== installing into $(VENV) (once; again only when pyproject.toml or constraints.txt changes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; call 'make PYTHON=/path/to/python3.11'"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	# its wheel asks for timm and so for torchvision, of which the networks need nothing
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps dynamic_network_architectures
	@touch $@

demo: install
	@echo "== demo: synthetic challenge -> two networks -> scores, submission and report, all in demo/"
	$(BIN)/snakemake all --profile profiles/demo --report report.html --report-after-run
	@echo "== done: open demo/report.html; scores are in demo/results/report/scores.csv"

test: install lint
	@echo "== tests: library, workflow, the demo end to end, real data where ../shared/data is present"
	$(BIN)/python -m pytest tests

lint: install
	@echo "== style, types and workflow lint"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/snakefmt --check workflow
	$(BIN)/mypy
	$(BIN)/snakemake --lint

unit: install
	$(BIN)/python -m pytest tests/unit

clean:
	rm -rf demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
