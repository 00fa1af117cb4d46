# `make demo` and `make test` do all of the set-up themselves: virtual environment, one pip resolution, then the work.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := metrics,train,tracking,demo,bench,test,dev
INSTALLED := $(VENV)/.installed

BUNDLE ?= brats
OUTPUT ?= runs/table_$(BUNDLE)

.PHONY: help install demo test bundles table figures clean

help:
	@echo "make demo     super-resolve a real brain volume: NIfTI, picture and table in demo_output/"
	@echo "make test     lint, types, tests and doctests: what continuous integration runs"
	@echo "make bundles  build the bundles' zip files in dist/"
	@echo "make clean    remove what the commands above made, the environment too"
	@echo "make table    measure a bundle beside its peers: DATA=<dataset folder> SPLIT=<json> [BUNDLE=brats|lidc, brats by"
	@echo "              default] [PEERS=<folder of swinir.pt, rcan.pt, ldm.pt>] [OUTPUT=<folder>, runs/table_<BUNDLE> by"
	@echo "              default] [ARGS='<more options of benchmarks/table.py, such as --contrasts t1,t2>']"
	@echo "make figures  draw the pictures of the documents in docs/images/: DATA, SPLIT, BUNDLE, PEERS as for make table,"
	@echo "              [ARGS='<more options of benchmarks/figures.py, such as --slice 20>']"

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

table: $(INSTALLED)
	@$(if $(and $(DATA),$(SPLIT)),,$(error make table needs DATA=<dataset folder> SPLIT=<json>; see make help))
	@$(BIN)/python -m benchmarks.table --bundle bundles/miar_$(BUNDLE) --dataset_dir "$(DATA)" --split_file "$(SPLIT)" \
		--output_dir "$(OUTPUT)" $(if $(PEERS),--peers_dir "$(PEERS)") $(ARGS)

figures: $(INSTALLED)
	@$(if $(and $(DATA),$(SPLIT)),,$(error make figures needs DATA=<dataset folder> SPLIT=<json>; see make help))
	@$(BIN)/python -m benchmarks.figures all --bundle bundles/miar_$(BUNDLE) --dataset_dir "$(DATA)" \
		--split_file "$(SPLIT)" --overwrite True $(if $(PEERS),--peers_dir "$(PEERS)") $(ARGS)

clean:
	rm -rf $(VENV) build dist demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
