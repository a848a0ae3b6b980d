# `make test` and `make demo` each do everything on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := cpu,tensorrt-rtx,test

.PHONY: help install test lint types demo bench clean

help:
	@echo "make install  a virtual environment in .venv with all that installs without a GPU"
	@echo "make test     lint, types and tests"
	@echo "make demo     build a model, export it, show the verdicts"
	@echo "make bench    what an export costs; writes benchmarks/results/export.json"

install: .venv/installed

# torch by its exact version: a looser request can take a build with gigabytes of CUDA.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy knows no package-dir: it gets the tree as it is installed.
types: install
	@rm -rf build/types && mkdir -p build/types
	@cp -r adaattn build/types/ && cp -r export plugins build/types/adaattn/
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p adaattn

test: lint types
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist worksteal

demo: install
	$(BIN)/python examples/demo_model.py build/demo/model.pt
	$(BIN)/adaattn-export build/demo/model.pt --output build/demo/export --force

bench: install
	$(BIN)/python -m benchmarks.export

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache
