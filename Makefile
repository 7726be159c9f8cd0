# make run: everything on whatever device there is. make test: the tests, CPU only. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPUS := $(shell nvidia-smi -L 2>/dev/null | wc -l)

BENCHES := $(filter-out bench/reference.py bench/fake_hopper.py bench/simulated_kernels.py bench/simulated_mlp.py,$(wildcard bench/*.py))

.PHONY: run record report compare evidence pack bench test lint simulate gpu gpu-systems gpu-frontier install dev

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/developer: $(VENV)/installed requirements-tools.txt
	$(BIN)/pip install --quiet -r requirements-tools.txt pytest pytest-xdist ruff brotli
	touch $@

install: $(VENV)/installed
dev: $(VENV)/developer

# The embedded default: docstrings and help topics of the installed packages, the miniature, about six minutes on 2 cores.
run: install
	$(BIN)/python tools/prepare_data.py pydocs
	PRESET=cpu DATASET=pydocs_sp1024 $(BIN)/python train_gpt.py

# FineWeb and the full run on all GPUs of this machine.
record: install
	$(BIN)/python tools/prepare_data.py fineweb --variant sp8192_caseops --train-shards 80
	PRESET=record $(BIN)/torchrun --standalone --nproc_per_node=$(GPUS) train_gpt.py

# The kept logs as a table and as runs/report.html, a page to open in a browser; LOGS chooses others.
LOGS ?= $(wildcard logs/????-??-??_*_seed*.txt)
report: dev
	$(BIN)/python tools/report.py $(LOGS) --html runs/report.html

# Eight systems on the same data with the same budget, small enough for a CPU (SHRINK=1, a tenth of the documents), as one
# table. Killed, it goes on when typed again. For spread SEED=0,1,2 VAL_DOC_FRACTION=1, since a seed draws its own sample; at
# full size, on GPUs: make compare SHRINK=0 VAL_DOC_FRACTION=1 DATASET=.. VOCAB_SIZE=..
SYSTEMS ?= pr1530,pr1560,pr1413,pr473,pr605,pr1855,pr2014,pr2135
SHRINK ?= 1
SEED ?= 1337
DATASET ?= pydocs_sp1024
DATA_DIR ?= data
VAL_DOC_FRACTION ?= 0.1
CODE := $(shell cksum < train_gpt.py | cut -d ' ' -f 1)
COMPARE ?= compare-$(DATASET)-$(CODE)
compare: dev
	$(if $(filter pydocs_sp1024,$(DATASET)),$(BIN)/python tools/prepare_data.py pydocs --data-dir "$(DATA_DIR)")
	DATASET="$(DATASET)" DATA_DIR="$(DATA_DIR)" VAL_DOC_FRACTION="$(VAL_DOC_FRACTION)" \
	  $(BIN)/python tools/sweep.py "$(COMPARE)" PRESET="$(SYSTEMS)" SHRINK="$(SHRINK)" SEED="$(SEED)" || [ $$? = 1 ]
	$(BIN)/python tools/report.py --compare logs/"$(COMPARE)"-????.txt

# Three seeds of `make run` and the eight systems, run anew on this source; their logs, and every
# figure of README.md, EXPERIMENTS.md and submission.json. Forty minutes on 2 cores; after a kill the
# same command goes on. The systems run on English documents if CORPUS is there, else on docstrings.
CORPUS ?= ../shared/corpus
CORPUS_TOKENIZER ?= ../shared/tokenizers/fineweb_8192_bpe.model
evidence: dev
	$(BIN)/python tools/evidence.py \
	  $(if $(wildcard $(CORPUS)),--corpus "$(CORPUS)" --tokenizer "$(CORPUS_TOKENIZER)")

# The submission folder of a finished run, checked: make pack RUN=runs/<RUN_ID>
pack: install
	$(BIN)/python tools/pack.py "$(RUN)" "$(RUN)/submission"

test: dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Every Triton kernel executed for Hopper without a GPU, in an environment of its own (a few GB), which PYTHON312 makes.
# Without it, or without the packages, the reason is printed and nothing else happens.
PYTHON312 ?= python3.12
SIMULATOR := .simulator
simulate:
	@if ! $(PYTHON312) -c "import sys; sys.exit(sys.version_info < (3, 12))" 2>/dev/null; then \
	  echo "make simulate: skipped: PYTHON312=$(PYTHON312) is no Python 3.12 or later"; \
	elif ! { test -f $(SIMULATOR)/installed || { $(PYTHON312) -m venv $(SIMULATOR) && \
	    $(SIMULATOR)/bin/pip install --quiet ttsem triton==3.8.0 torch==2.14.0 numpy pytest && \
	    touch $(SIMULATOR)/installed; }; }; then \
	  echo "make simulate: skipped: ttsem, triton 3.8.0 or torch 2.14.0 cannot be installed"; \
	else \
	  $(SIMULATOR)/bin/python -m ttsem.sanitize pytest bench/simulated_kernels.py -q -rA -p no:cacheprovider && \
	  for flatten in 0 1; do \
	    echo "after every pass of the compiler, FLATTEN=$$flatten:"; \
	    FLATTEN=$$flatten PYTHONPATH=bench \
	      $(SIMULATOR)/bin/python -m ttsem.validate bench/simulated_mlp.py --device cpu || exit 1; \
	  done; \
	fi

# Every script under bench/ (reference.py and fake_hopper.py are what they share) in its small CPU form; under five minutes.
bench: install
	for script in $(BENCHES); do PRESET=cpu CUDA_VISIBLE_DEVICES= $(BIN)/python $$script || exit 1; done

# The first fifteen minutes on one GPU: tests, a captured row, speeds, compression and a short full-size run, each with a
# table of its own, or only some PARTS of it (see bench/gpu.sh). PYTHON must have torch with CUDA.
gpu:
	bash bench/gpu.sh "$(PYTHON)" $(PARTS)

# The eight systems at full size on one GPU, 90 s of training each, as one table. SYSTEMS="pr1413 pr473" runs some.
gpu-systems:
	bash bench/gpu.sh "$(PYTHON)" systems

# The accepted records of April and May, and ours, likewise.
gpu-frontier:
	SYSTEMS="pr1855 pr2014 pr2135 record" bash bench/gpu.sh "$(PYTHON)" systems
