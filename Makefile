# Needs python3 (3.11 or newer) and make only: everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.current
# Where `make demo` and `make demo-scratch` work; `make demo OUTPUT=runs/another` keeps an earlier demo.
OUTPUT ?= runs/$@
# What `make fuzz` reads: cases (of media; a tenth of the others), their seed, most minutes for each kind, and where it
# keeps its progress, from which it goes on.
N ?= 10000
SEED ?= 1
MINUTES ?= 120
FUZZ ?= runs/fuzz
# How many tests run at a time.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-scratch test lint format check-slow fuzz bench

help:
	@echo "make demo        fine-tune the shipped weights on a world they have not seen; write runs/demo/report.html"
	@echo "make demo-scratch  train the tiny model from random weights instead; write runs/demo-scratch/report.html"
	@echo "make test        run the tests"
	@echo "make lint        check style and formatting"
	@echo "make format      mend style and formatting"
	@echo "make check-slow  run the tests that take minutes"
	@echo "make fuzz        read N=10000 damaged files and a tenth as many other inputs; resumes (docs/robustness.md)"
	@echo "make bench       run the benchmarks"
	@echo "make venv        set up .venv (every target above does so itself)"

venv: $(STAMP)

# torch goes first and alone, so that nothing else decides which build of it is taken.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Mirasol needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}: make PYTHON=python3.12 …")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@echo "Setting up .venv (once)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check torch==2.13.0 --constraint constraints.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	@touch $@

demo: venv
	@$(BIN)/mirasol demo --output $(OUTPUT)

demo-scratch: venv
	@$(BIN)/mirasol demo --scratch --output $(OUTPUT)

test: venv
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: venv
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

format: venv
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

check-slow: venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[dev,prepare]' --constraint constraints.txt
	@$(BIN)/python -m pytest -m slow

fuzz: venv
	@$(BIN)/python tests/fuzz/fuzz.py --count $(N) --seed $(SEED) --minutes $(MINUTES) --folder $(FUZZ)

bench: venv
	@set -e; for benchmark in benchmarks/[a-z]*.py; do echo "$$benchmark"; $(BIN)/python "$$benchmark"; done
