#!/usr/bin/env bash
# What only a GPU can say, in the order in which a fault would show. Each part writes a table to
# bench/results/ before the next begins, and one to $OUT if that is set:
#   tests        the tests marked gpu: kernels and attention against references
#   flatten      the MLP kernel with and without flattened loops: numbers, then times
#   capture      one row of training recorded as a CUDA graph, against the same row without
#   step         training steps beside REFERENCE=FILE, the script of PR #1530, if set
#   evaluation   test-time training of batches of documents, beside the same script
#   compression  calibration, quantisation and packing at full size
#   run          the record preset on one GPU: GPU_SECONDS (default 60) of training, then GPU_DOCS
#                (default 0.01) of the documents
#   kernels      every kernel compiled and timed
#   systems      the nine systems at full size, GPU_SECONDS (default 90) of training each, as one
#                table; SYSTEMS="pr1413 pr473" runs some
#
# Usage: bench/gpu.sh [PYTHON] [PART..]
# Without a part, all but systems run, in fifteen minutes of one H100 or H200. A part that fails, or
# is cut because it takes longer than its share, is named in one line with what to try, and does not
# keep the next one from running. <PART>_SECONDS sets the share of a part, which may be longer when
# it runs alone. Later runs on the same machine find its compiled code.
#
# PYTHON needs a torch with CUDA. Packages that it lacks are installed from ./wheels if that folder
# is there. Text comes from ./shared or ../shared if it is there, else from FineWeb.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${1:-python3}
shift || true
PARTS=${*:-tests flatten capture step evaluation compression run kernels}

if ! "$PYTHON" -c "import sentencepiece, zstandard, brotli, tqdm, pytest" 2>/dev/null; then
  "$PYTHON" -m pip install --quiet --no-index --find-links wheels \
    sentencepiece zstandard brotli tqdm pytest
fi
"$PYTHON" - <<'CHECK'
import sys, torch
import train_gpt as tg
name, log = tg.choose_attention("auto", torch.device("cuda"), torch.bfloat16)
print(*log, sep="\n")
if name == "sdpa":
    sys.exit("bench/gpu.sh: only sdpa works here, which loops over documents: nothing to measure")
CHECK

SHARED=$([ -d shared ] && echo shared || echo ../shared)
# Only run and systems read text; evaluation draws random documents as long as FineWeb's.
TEXT=corpus_sp8192
if [[ ! $PARTS =~ run|systems ]]; then
  :
elif [ -d "$SHARED/corpus" ]; then
  "$PYTHON" tools/prepare_data.py text "$SHARED/corpus/train.jsonl.zst" \
    --val "$SHARED/corpus/val.jsonl.zst" \
    --tokenizer "$SHARED/tokenizers/fineweb_8192_bpe.model" --name corpus
else
  "$PYTHON" tools/prepare_data.py fineweb --variant sp8192 --train-shards 1
  TEXT=fineweb10B_sp8192
fi

mkdir -p bench/results logs
STAMP=$(date +%Y%m%d-%H%M%S)
FAILED=""

# advice PART: what to try when a part fails.
advice() {
  case $1 in
    tests) echo "FUSED_MLP=0, FUSED_QK=0, FUSED_XSA=0 or FUSED_CE=0, whichever test failed" ;;
    flatten) echo "nothing: the loops are not flattened in a run" ;;
    capture) echo "leave CUDA_GRAPH=0" ;;
    step) echo "COMPILE=0 leaves the compiler out; MICRO_BATCH_TOKENS=49152 saves memory" ;;
    evaluation) echo "TTT_BATCH_SIZE=32 saves memory, TTT_BUCKETS=1 compiles one size" ;;
    compression) echo "QUANTIZER=gptq COLUMN_SCALES=0 is the published way" ;;
    run) echo "PRESET=pr1530, which has fewer parts; logs/gpu_*.txt shows how far it came" ;;
    kernels) echo "the torch of requirements.txt, which brings its Triton" ;;
    *) echo "its log is in logs/" ;;
  esac
}

# part NAME SECONDS COMMAND..: runs a command for at most so long, and writes its output to
# bench/results/ and, line by line, to $OUT.
part() {
  local table="bench/results/$1_$STAMP.txt" status=0
  local copies=("$table" ${OUT:+"$OUT/$1_$STAMP.txt"})
  {
    local commit
    commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
    echo "date: $(date -u +%Y-%m-%d) commit: $commit"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  } > "$table"
  timeout -k 10 "$2" "${@:3}" 2>&1 | tee -a "${copies[@]}" || status=$?
  local try
  try=$(advice "$1")
  if [ $status = 124 ] || [ $status = 137 ]; then
    local share=${1%%_*}
    try="${share^^}_SECONDS=$((2 * $2)) gives it more time"
  fi
  if [ $status != 0 ]; then
    FAILED="$FAILED $1"
    echo "$1: exit status $status (124: cut after $2 s); try: $try" | tee -a "${copies[@]}"
  fi
}

export VAL_LOSS_EVERY=0
# REFERENCE is the script of PR #1530, so it is timed beside the same system.
BENCHED=${REFERENCE:+pr1560}
BENCHED=${BENCHED:-record}
for name in $PARTS; do
  case $name in
    tests) part tests "${TESTS_SECONDS:-120}" "$PYTHON" -m pytest -q -m gpu ;;
    flatten) part flatten "${FLATTEN_SECONDS:-60}" "$PYTHON" -u bench/kernels.py --flatten ;;
    capture) PRESET=record part capture "${CAPTURE_SECONDS:-90}" "$PYTHON" -u bench/phases.py capture ;;
    step) PRESET=$BENCHED part step "${STEP_SECONDS:-140}" \
      "$PYTHON" -u bench/step.py --rounds 5 ${REFERENCE:+--reference "$REFERENCE"} ;;
    evaluation) PRESET=$BENCHED part evaluation "${EVALUATION_SECONDS:-120}" \
      "$PYTHON" -u bench/evaluation.py --batches 2 ${REFERENCE:+--reference "$REFERENCE"} ;;
    compression) PRESET=record part compression "${COMPRESSION_SECONDS:-120}" \
      "$PYTHON" -u bench/phases.py compression ;;
    run) PRESET=record DATASET=$TEXT RUN_ID="gpu_$STAMP" MAX_WALLCLOCK_SECONDS=${GPU_SECONDS:-60} \
      VAL_DOC_FRACTION=${GPU_DOCS:-0.01} WARMUP_STEPS=2 \
      part run "${RUN_SECONDS:-150}" "$PYTHON" train_gpt.py ;;
    kernels) part kernels "${KERNELS_SECONDS:-40}" "$PYTHON" -u bench/kernels.py --first ;;
    systems)
      for preset in ${SYSTEMS:-pr1530 pr1560 pr1413 pr473 pr605 pr1855 pr2014 pr2135 record}; do
        PRESET=$preset DATASET=$TEXT RUN_ID="systems_${preset}_$STAMP" VOCAB_SIZE=8192 \
          MAX_WALLCLOCK_SECONDS=${GPU_SECONDS:-90} VAL_DOC_FRACTION=${GPU_DOCS:-0.02} \
          GPTQ_CALIBRATION_BATCHES=16 GPTQ_RESERVE_SECONDS=-1 COMPRESSOR=zstd \
          part "systems_$preset" "${SYSTEMS_SECONDS:-580}" "$PYTHON" train_gpt.py
        if [ -n "${OUT:-}" ]; then cp "logs/systems_${preset}_$STAMP.txt" "$OUT/" || true; fi
      done
      part comparison "${COMPARISON_SECONDS:-60}" "$PYTHON" tools/report.py --compare logs/systems_*_"$STAMP".txt ;;
    *)
      echo "bench/gpu.sh: $name: must be one of tests flatten capture step evaluation compression" \
        "run kernels systems" >&2
      exit 2
      ;;
  esac
done

if [ -n "$FAILED" ]; then
  echo "bench/gpu.sh: failed or cut:$FAILED" >&2
  exit 1
fi
