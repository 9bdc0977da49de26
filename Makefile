# make tour | test | test-gpu | bench | lab | export | rendered | site | lint | hooks.  PIP_ARGS goes to pip (README: CPU-only or another CUDA build of torch).
.PHONY: tour test test-gpu bench lab export rendered site lint hooks
.DELETE_ON_ERROR:
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed

tour: $(INSTALLED)
	$(BIN)/sfa run 00_tour

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --no-loadscope-reorder tests

test-gpu: $(INSTALLED)
	$(BIN)/python tests/gpu/gpu_check.py

bench: $(INSTALLED)
	$(BIN)/python tests/bench.py

lab: $(INSTALLED)
	$(BIN)/jupyter lab --ServerApp.ip=127.0.0.1 --ServerApp.root_dir="$(CURDIR)" $(LAB_ARGS)

export: $(INSTALLED)
	$(BIN)/python site/flow.py
	$(BIN)/jupyter nbconvert --clear-output --inplace --log-level=ERROR notebooks/*.ipynb notebooks/*/*.ipynb notebooks/library/*/*.ipynb
	$(BIN)/nbdev_clean
	env -u IN_TEST $(BIN)/nbdev_export

rendered: $(INSTALLED)
	$(BIN)/python site/build_site.py rendered

site: $(INSTALLED)
	$(BIN)/python site/build_site.py site

lint: $(BIN)/ruff
	$(BIN)/ruff check notebooks tests site setup.py

hooks: $(INSTALLED)
	$(BIN)/pre-commit install

# Ruff alone, so that `make lint` takes seconds on a machine where nothing is installed yet.
$(BIN)/ruff:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt ruff

# Installed once: again only when the requirements change. What pip says is shown when it fails.
$(INSTALLED): settings.ini setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing what constraints.txt pins: once, some minutes. Progress: tail -f .venv/install.log"
	@$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[dev]" >.venv/install.log 2>&1 || { cat .venv/install.log >&2; exit 1; }
	@touch $@
