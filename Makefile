# make run: everything on whatever device there is. make test: the tests, CPU only. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPUS := $(shell nvidia-smi -L 2>/dev/null | wc -l)

BENCHES := $(filter-out bench/reference.py bench/fake_hopper.py bench/simulated_kernels.py bench/simulated_mlp.py,$(wildcard bench/*.py))

.PHONY: run record report compare evidence pack pack-arguments bench faults test lint simulate gpu gpu-systems gpu-frontier install dev

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' || { \
	  echo "make: $(PYTHON) is not Python 3.10 to 3.13; choose one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { \
	  echo "make: $(PYTHON) cannot make environments: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch and a few packages into $(VENV): about 3 GB on Linux, minutes"
	@$(BIN)/pip install --quiet --upgrade pip && $(BIN)/pip install --quiet -r requirements.txt || { \
	  echo "make: pip failed. No network? Behind a proxy set HTTPS_PROXY, for a mirror PIP_INDEX_URL;" \
	    "without CUDA: PIP_EXTRA_INDEX_URL of PyTorch's CPU builds. Then type make again"; exit 1; }
	touch $@

$(VENV)/developer: $(VENV)/installed requirements-tools.txt
	$(BIN)/pip install --quiet -r requirements-tools.txt pytest pytest-xdist ruff brotli
	touch $@

install: $(VENV)/installed
dev: $(VENV)/developer

# The embedded default: docstrings and help topics of the installed packages, the miniature, about five minutes on 2 cores,
# then what the model writes and a picture of the run. Knobs stand behind it: make run SEED=1 MATRIX_LR=0.02
PRESET ?= cpu
DATASET ?= pydocs_sp1024_caseops
DATA_DIR ?= data
run: install
	$(if $(filter pydocs_sp1024_caseops,$(DATASET)),$(BIN)/python tools/prepare_data.py pydocs --data-dir "$(DATA_DIR)")
	PRESET="$(PRESET)" DATASET="$(DATASET)" DATA_DIR="$(DATA_DIR)" $(BIN)/python train_gpt.py
	$(BIN)/python tools/samples.py
	$(BIN)/python tools/picture.py

# FineWeb and the full run on all GPUs of this machine.
record: install
	@test $(GPUS) -gt 0 || { echo "make record: nvidia-smi shows no GPU here; make run is for a CPU"; exit 1; }
	$(BIN)/python tools/prepare_data.py fineweb --variant sp8192_caseops --train-shards 80
	PRESET=record $(BIN)/torchrun --standalone --nproc_per_node=$(GPUS) train_gpt.py

# Every run so far as a table and as runs/report.html, a page to open in a browser: newest first, by
# configuration. LOGS chooses others.
LOGS ?= $(wildcard logs/*.txt)
report: dev
	$(BIN)/python tools/report.py --history $(LOGS) --html runs/report.html

# Nine systems on the same data with the same budget, small enough for a CPU (SHRINK=1, a tenth of the documents), as one
# table. Killed, it goes on when typed again. For spread SEED=0,1,2 VAL_DOC_FRACTION=1, since a seed draws its own sample; at
# full size, on GPUs: make compare SHRINK=0 VAL_DOC_FRACTION=1 DATASET=.. VOCAB_SIZE=..
SYSTEMS ?= pr1530,pr1560,pr1413,pr473,pr605,pr1855,pr2014,pr2135,record
SHRINK ?= 1
SEED ?= 1337
VAL_DOC_FRACTION ?= 0.1
CODE := $(shell cksum < train_gpt.py | cut -d ' ' -f 1)
COMPARE ?= compare-$(DATASET)-$(CODE)
compare: dev
	$(if $(filter pydocs_sp1024_caseops,$(DATASET)),$(BIN)/python tools/prepare_data.py pydocs --data-dir "$(DATA_DIR)")
	DATASET="$(DATASET)" DATA_DIR="$(DATA_DIR)" VAL_DOC_FRACTION="$(VAL_DOC_FRACTION)" \
	  $(BIN)/python tools/sweep.py "$(COMPARE)" PRESET="$(SYSTEMS)" SHRINK="$(SHRINK)" SEED="$(SEED)" || [ $$? = 1 ]
	$(BIN)/python tools/report.py --compare logs/"$(COMPARE)"-????.txt

# Three seeds of `make run` and the nine systems, run anew on this source; their logs, and every
# figure of README.md, EXPERIMENTS.md and submission.json. Forty minutes on 2 cores; after a kill the
# same command goes on. The systems run on English documents if CORPUS is there, else on docstrings.
CORPUS ?= ../shared/corpus
CORPUS_TOKENIZER ?= ../shared/tokenizers/fineweb_8192_bpe.model
evidence: dev
	$(BIN)/python tools/evidence.py \
	  $(if $(wildcard $(CORPUS)),--corpus "$(CORPUS)" --tokenizer "$(CORPUS_TOKENIZER)")

# The submission of a finished run, checked, as the challenge keeps it: records/TRACK/<day>_NAME/
#   make pack NAME="Loops and gates" AUTHOR="A. Nother" TRACK=track_10min_16mb
# RUN= names another run than the newest, LOGS= more seeds, BASELINE= logs to compare with, WEIGHTS=1 adds the artifact, DATE=
# is the day where the log does not say it. Without NAME it takes RUN and writes RUN/submission, with the artifact.
pack: pack-arguments $(if $(BASELINE),dev,install)
	$(BIN)/python tools/pack.py $(if $(RUN),"$$RUN") $(if $(NAME)$(AUTHOR)$(TRACK),$(RECORD),"$$RUN/submission")$(MORE)
MORE = $(if $(filter file,$(origin LOGS)),, --log $(LOGS))
pack-arguments:
	@test -n "$$RUN$$NAME$$AUTHOR$$TRACK" || { \
	  echo "make pack: name a run, RUN=runs/ID, or the submission, NAME= AUTHOR= TRACK="; exit 1; }
# The shell reads these variables, so that quotes in them stay as they are.
export RUN NAME AUTHOR TRACK GITHUB_ID BLURB DATE
RECORD = --records records --name "$$NAME" --author "$$AUTHOR" --track "$$TRACK" \
  --github-id "$$GITHUB_ID" --blurb "$$BLURB" --date "$$DATE" $(if $(WEIGHTS),--weights) $(if $(BASELINE),--baseline $(BASELINE))

test: dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# Kills at random moments, pairs of processes, odd files and full disks, over tiny runs below
# runs/faults; two hours on 2 idle cores. Stopped, it goes on when typed again. KILLS, FAULTS_SEED.
KILLS ?= 1000
FAULTS_SEED ?= 1
faults: dev
	$(BIN)/python tools/faults.py --kills $(KILLS) --seed $(FAULTS_SEED)

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

# The nine systems at full size on one GPU, 90 s of training each, as one table. SYSTEMS="pr1413 pr473" runs some.
gpu-systems:
	bash bench/gpu.sh "$(PYTHON)" systems

# The accepted records of April and May, and ours, likewise.
gpu-frontier:
	SYSTEMS="pr1855 pr2014 pr2135 record" bash bench/gpu.sh "$(PYTHON)" systems
