# `make demo` and `make test` do all of the set-up themselves: virtual environment, one pip resolution, then the work.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := metrics,train,tracking,demo,test,dev
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test bundles clean

help:
	@echo "make demo     super-resolve a real brain volume: NIfTI, picture and table in demo_output/"
	@echo "make test     lint, types, tests and doctests: what continuous integration runs"
	@echo "make bundles  build the bundles' zip files in dist/"
	@echo "make clean    remove what the commands above made, the environment too"

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@echo "Installing into $(VENV): two to five minutes, about 6 GB, only this once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check -qq --editable ".[$(EXTRAS)]" --constraint constraints.txt
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/python -m miar_monai.demo

test: export OMP_NUM_THREADS = 1
test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4

bundles: $(INSTALLED)
	@$(BIN)/python -m miar_monai.bundles build

clean:
	rm -rf $(VENV) build dist demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
