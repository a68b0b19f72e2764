# One virtual environment, made on first use; nothing is installed outside this folder and nothing needs root.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
CONSTRAINTS := constraints.txt

.PHONY: help demo demo-3d test test-oldest test-slow test-kernels lint checkpoint experiments bench bench-gpu clean

help:
	@echo "make demo         set up, then convert, fine-tune and report on real images (about 6 minutes after set-up)"
	@echo "make demo-3d      set up, then render views of 3D scenes that no model has seen, by several models, and report"
	@echo "make test         set up, then the quick tests (about 6 minutes after set-up on 2 cores)"
	@echo "make test-oldest  the same with torch 2.11 and Triton 3.6, the oldest allowed, in a second environment (.venv-oldest)"
	@echo "make test-slow    the slow tests"
	@echo "make test-kernels every GPU kernel compiled for every architecture (an hour, no GPU needed)"
	@echo "make lint         ruff and mypy --strict"
	@echo "make checkpoint   train the shipped ViT again on Fashion-MNIST (over an hour on 2 cores)"
	@echo "make bench        the benchmarks, written to benchmarks/results/"
	@echo "make bench-gpu    on an NVIDIA GPU: those that have no result of it yet (hours; resumable)"
	@echo "make experiments  the tables of experiments/ (hours on 2 cores; resumable)"

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "vitrify needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "Setting up $(VENV): PyTorch brings its CUDA libraries along, about 5.5 GB on disk and 2 to 5 minutes the first time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar off --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/vitrify demo --output demo-output

demo-3d: $(STAMP)
	$(BIN)/vitrify nvs demo --output demo-output-3d

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m "not slow and not matrix"

test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m slow

test-kernels: $(STAMP)
	$(BIN)/python -m pytest -n 2 -m matrix

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

checkpoint: $(STAMP)
	$(BIN)/python tools/train_checkpoint.py

bench: $(STAMP)
	$(BIN)/vitrify bench attention --output benchmarks/results
	$(BIN)/vitrify bench shift --output benchmarks/results
	$(BIN)/vitrify bench hamming --output benchmarks/results
	$(BIN)/vitrify bench mixture --compile --output benchmarks/results
	$(BIN)/vitrify bench models --output benchmarks/results
	$(BIN)/vitrify bench models --models vit_base_patch16_224:224 --recipe examples/shift_int8.yaml --runtimes --compile \
	  --output benchmarks/results/shift_int8
	$(BIN)/python benchmarks/tables.py

bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/runs.py; status=$$?; $(BIN)/python benchmarks/tables.py && exit $$status

experiments: $(STAMP)
	$(BIN)/python experiments/vitality/run.py
	$(BIN)/python experiments/vitality/run.py --rows softmax taylor_squares squares_conv5_distill --seeds 1 2
	$(BIN)/python experiments/vitality/logits.py
	$(BIN)/python -m pip install --quiet elpv-dataset
	$(BIN)/python experiments/vitality/elpv.py
	$(BIN)/python experiments/shiftaddvit/run.py
	$(BIN)/python experiments/shiftaddvit/run.py --rows softmax shiftaddvit vitrify vitrify_squares_distill --seeds 1 2
	$(BIN)/python experiments/shiftaddvit/run.py --table rows_pvt.yaml
	$(BIN)/python experiments/shiftaddvit/run.py --table rows_few.yaml
	$(BIN)/python experiments/shiftaddvit/rounding.py
	$(BIN)/python experiments/nvs/run.py
	$(BIN)/python experiments/nvs/cost.py

clean:
	rm -rf $(VENV) .venv-oldest build dist demo-output demo-output-3d
