# `make demo` and `make test` create the virtual environment and install everything before they run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := metrics,train,tracking,demo,bench,docs,test,dev
INSTALLED := $(VENV)/.installed

BUNDLE ?= brats
OUTPUT ?= runs/table_$(BUNDLE)

# MONAI Label needs older versions of what this package uses, so it has an environment of its own
LABEL_VENV := .venv-label
LABEL_BIN := $(LABEL_VENV)/bin
LABEL_INSTALLED := $(LABEL_VENV)/.installed
LABEL_DIR := runs/label
# The largest packages are the same in both, so hard links to those of .venv save disk space, for the same version of
# Python. pip replaces packages of other versions, and installs everything if there is no .venv or no GNU cp.
SHARE = (cd $(VENV)/lib && test -e ../../$(INSTALLED) && cp -al --parents \
	$(addprefix python3*/site-packages/,torch* functorch triton* nvidia* itk*) ../../$(LABEL_VENV)/lib/) 2>/dev/null || true
PORT ?= 8000
STUDIES ?= $(LABEL_DIR)/studies

.PHONY: help install demo test docs bundles dist table figures viewer-figure label-server test-label clean

help:
	@echo "make demo     super-resolve a real brain volume: NIfTI, picture and table in demo_output/"
	@echo "make test     lint, types, tests and doctests"
	@echo "make docs     build the documentation: docs/_build/html/index.html"
	@echo "make bundles  compose the configs of the bundles, build their zip files in dist/, and lay them out as repositories"
	@echo "              of Hugging Face in dist/huggingface/"
	@echo "make dist     build two wheels (and sdists) in dist/, of the code and of the weights: pip install dist/*.whl"
	@echo "make clean    remove what the commands above made, the environment too"
	@echo "make table    compare a bundle with its peers: DATA=<dataset folder> SPLIT=<json> [BUNDLE=brats|lidc, brats by"
	@echo "              default] [PEERS=<folder of swinir.pt, rcan.pt, ...>] [OUTPUT=<folder>, runs/table_<BUNDLE> by"
	@echo "              default] [ARGS='<more options of benchmarks/table.py, such as --contrasts t1,t2>']"
	@echo "make figures  draw the pictures of the documents in docs/images/: DATA, SPLIT, BUNDLE, PEERS as for make table,"
	@echo "              [ARGS='<more options of benchmarks/figures.py, such as --slice 20>']"
	@echo "make viewer-figure  draw the page of miar view, docs/images/viewer.png; needs Chromium"
	@echo "make label-server  start a MONAI Label server with both models on http://127.0.0.1:$(PORT) and a brain to try it"
	@echo "              with [PORT=<number>] [STUDIES=<folder or URL of a DICOMweb server>]"
	@echo "make test-label  test the MONAI Label app against real servers; .ci/run does make test and this"

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@echo "Installing into $(VENV): two to five minutes, about 8 GB, only this once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check -qq --editable ".[$(EXTRAS)]" --constraint constraints.txt
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/python -m miar_monai demo

test: export OMP_NUM_THREADS = 1
test: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4

# The pages of the reference are generated from scratch: a page of a removed module would cause a warning, an error here.
docs: export OMP_NUM_THREADS = 1
docs: $(INSTALLED)
	@rm -rf docs/_build docs/reference/generated
	@$(BIN)/python -m sphinx -q -n -W --keep-going docs docs/_build/html
	@echo docs/_build/html/index.html

bundles: $(INSTALLED)
	@$(BIN)/python -m miar_monai.cli.build_bundles render
	@$(BIN)/python -m miar_monai.cli.build_bundles build

dist: $(INSTALLED)
	@for project in . bundles; do $(BIN)/python -m build --no-isolation --outdir dist $$project || exit 1; done

table: $(INSTALLED)
	@$(if $(and $(DATA),$(SPLIT)),,$(error make table needs DATA=<dataset folder> SPLIT=<json>; see make help))
	@$(BIN)/python -m benchmarks.table --bundle bundles/miar_$(BUNDLE) --dataset_dir "$(DATA)" --split_file "$(SPLIT)" \
		--output_dir "$(OUTPUT)" $(if $(PEERS),--peers_dir "$(PEERS)") $(ARGS)

figures: $(INSTALLED)
	@$(if $(and $(DATA),$(SPLIT)),,$(error make figures needs DATA=<dataset folder> SPLIT=<json>; see make help))
	@$(BIN)/python -m benchmarks.figures all --bundle bundles/miar_$(BUNDLE) --dataset_dir "$(DATA)" \
		--split_file "$(SPLIT)" --overwrite True $(if $(PEERS),--peers_dir "$(PEERS)") $(ARGS)

viewer-figure: $(INSTALLED)
	@$(BIN)/python -m benchmarks.viewer_figure --overwrite True

$(LABEL_INSTALLED): setup.cfg pyproject.toml constraints-label.txt
	@echo "Installing MONAI Label into $(LABEL_VENV): up to five minutes and 8 GB (2 GB in addition to $(VENV)), only this once."
	@test -x $(LABEL_BIN)/python || { $(PYTHON) -m venv $(LABEL_VENV) && $(SHARE); }
	@SAM2_BUILD_CUDA=0 $(LABEL_BIN)/python -m pip install --disable-pip-version-check -qq --editable ".[label,demo,test]" \
		--constraint constraints-label.txt
	@touch $@

$(LABEL_DIR)/studies/icbm152.nii.gz: | $(LABEL_INSTALLED)
	@$(LABEL_BIN)/python -c "from miar_monai.cli.demo import degrade, template; degrade(template(), '$(LABEL_DIR)', num_slices=8)"
	@mkdir -p $(@D) && mv $(LABEL_DIR)/lr.nii.gz $@ && rm $(LABEL_DIR)/hr.nii.gz

label-server: $(LABEL_DIR)/studies/icbm152.nii.gz
	@rm -rf $(LABEL_DIR)/app && cp -r "$$($(LABEL_BIN)/miar label-app)" $(LABEL_DIR)/app
	@MONAI_LABEL_SESSION_PATH=$(LABEL_DIR)/sessions MONAI_LABEL_DICOMWEB_CACHE_PATH=$(LABEL_DIR)/pacs \
		$(LABEL_BIN)/python -m monailabel.main start_server --app $(LABEL_DIR)/app --studies "$(STUDIES)" \
		--host 127.0.0.1 --port $(PORT)

test-label: export OMP_NUM_THREADS = 1
test-label: $(LABEL_INSTALLED)
	$(LABEL_BIN)/python -m pytest -q tests/label tests/data/test_dicom_writer.py tests/data/test_dicom_slices.py \
		tests/data/test_dicom_classic.py

clean:
	rm -rf $(VENV) $(LABEL_VENV) build dist demo_output docs/_build docs/reference/generated .pytest_cache .mypy_cache \
		.ruff_cache .hypothesis *.egg-info bundles/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
