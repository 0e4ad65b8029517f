# Everything sets itself up in .venv; PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test fuzz kill lint bench evidence clean

demo: $(VENV)/.run
	$(BIN)/rotatek-compile --model tiny-llava-next --calib mixed --num-samples 24 --output artifacts/demo --overwrite
	$(BIN)/python tools/demo.py artifacts/demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests

fuzz: $(VENV)/.test
	$(BIN)/python tools/fuzz_artifact.py --cases 20000

kill: $(VENV)/.test
	$(BIN)/python tools/kill_compile.py --kills 50

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/python tools/check_types.py

bench: $(VENV)/.test
	$(BIN)/python benchmarks/bench_decode.py --output benchmarks/results

# About an hour and a half on four cores. EVIDENCE='--models tiny-qwen3-vl --seeds 0 --documents 9 --jobs 2' is a part of it.
evidence: $(VENV)/.test
	$(BIN)/python benchmarks/evidence.py $(EVIDENCE)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: setup.cfg constraints.txt | $(VENV)/bin/python
	$(PIP) -e .
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(PIP) -e '.[test]'
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(PIP) -e '.[test,dev]'
	touch $@

clean:
	rm -rf $(VENV) artifacts build *.egg-info
