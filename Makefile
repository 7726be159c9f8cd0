# make run: everything on whatever device there is. make test: the tests, CPU only. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPUS := $(shell nvidia-smi -L 2>/dev/null | wc -l)

BENCHES := $(filter-out bench/reference.py,$(wildcard bench/*.py))

.PHONY: run record test lint bench gpu install dev

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/developer: $(VENV)/installed
	$(BIN)/pip install --quiet pytest ruff brotli
	touch $@

install: $(VENV)/installed
dev: $(VENV)/developer

# The embedded default: docstrings and help topics of the installed packages, the miniature, about six minutes on 2 cores.
run: install
	$(BIN)/python tools/prepare_data.py pydocs
	PRESET=cpu DATASET=pydocs_sp1024 $(BIN)/python train_gpt.py

# FineWeb and the full run on all GPUs of this machine.
record: install
	$(BIN)/python tools/prepare_data.py fineweb --variant sp8192 --train-shards 128
	PRESET=record $(BIN)/torchrun --standalone --nproc_per_node=$(GPUS) train_gpt.py

test: dev
	$(BIN)/python -m pytest -q

lint: dev
	$(BIN)/ruff check .

# Every script under bench/ (reference.py is what they share) in its small CPU form; under five minutes.
bench: install
	for script in $(BENCHES); do PRESET=cpu CUDA_VISIBLE_DEVICES= $(BIN)/python $$script || exit 1; done

# GPU tests, then a full-size run of a few minutes on one GPU; fits in ten minutes. PYTHON must have torch with CUDA.
gpu:
	bash bench/gpu.sh "$(PYTHON)"
