# The two commands: `make demo` and `make test`. Everything is installed into .venv, at the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
DEMO := out/demo
# Tiny models keep Python busy, not the matrix products: two processes of one thread each take half the time of one of two.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: demo app install test test-all test-browser bench lint notebooks clean

demo: $(VENV)/core
	$(BIN)/workbench pull
	$(BIN)/workbench verify
	$(BIN)/workbench map-neurons --side all --out $(DEMO)
	@echo
	@echo "Look:  open $(DEMO)/neurons.html in a browser"
	@echo "Ask:   $(BIN)/workbench find-neurons dog --map $(DEMO)"
	@echo "Try:   $(BIN)/workbench scan --prompt 'The capital of France is'"
	@echo "Open:  make app"
	@echo "Read:  notebooks/, from 01_neurons_that_speak.ipynb on"

app: $(VENV)/app
	$(BIN)/workbench pull
	[ -e $(DEMO)/run.json ] || $(BIN)/workbench map-neurons --side all --out $(DEMO)
	$(BIN)/workbench app

install: $(VENV)/dev
	$(BIN)/workbench pull

test: install
	$(TEST)

test-all: notebooks
	$(PIP) -e '.[sae,transformer-lens,nnsight]'
	$(TEST) -m ""

test-browser: install
	$(BIN)/python -m pytest -p no:xdist tests/browser

bench: install
	$(BIN)/python tests/benchmarks/neuron_map.py
	$(BIN)/python tests/benchmarks/whole_map.py
	$(BIN)/python tests/benchmarks/lens.py
	$(BIN)/python tests/benchmarks/backward_lens.py
	$(BIN)/python tests/benchmarks/gradient_ranks.py
	$(BIN)/python tests/benchmarks/probing.py
	$(BIN)/python tests/benchmarks/erasing.py
	$(BIN)/python tests/benchmarks/capture.py
	$(BIN)/python tests/benchmarks/store.py
	$(BIN)/python tests/benchmarks/reading.py
	$(BIN)/python tests/benchmarks/rerun.py
	$(BIN)/python tests/benchmarks/top_activations.py --tokens 50000
	$(BIN)/python tests/benchmarks/command_line.py
	$(BIN)/python tests/benchmarks/self_check.py
	$(BIN)/python tests/benchmarks/explorer.py

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

notebooks: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --nbmake --nbmake-timeout=300 -p no:cacheprovider notebooks

clean:
	rm -rf $(VENV) out build dist *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Python's venv module is needed (Debian: apt-get install python3-venv)"; exit 1; }

$(VENV)/core: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[fast]'
	@touch $@

$(VENV)/app: $(VENV)/core
	$(PIP) -e '.[app,fast]'
	@touch $@

$(VENV)/dev: $(VENV)/core
	$(PIP) -e '.[dev]'
	@touch $@
