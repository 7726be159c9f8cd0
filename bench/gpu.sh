#!/usr/bin/env bash
# GPU tests, the speed of a step and of the evaluation (beside the public script REFERENCE=FILE, if set), then the record
# preset on one GPU for a minute; the tables go to bench/results/.
# Usage: bench/gpu.sh [PYTHON] [systems]. Needs a CUDA torch in PYTHON; packages it lacks are taken from ./wheels if that is
# there. With `systems`: instead, the five systems at full size, each with GPU_SECONDS (default 90) of training, as one table;
# SYSTEMS="pr1413 pr473" runs some, and whoever must stop after ten minutes runs the rest afterwards.
# Ten minutes on one H100 or H200: at most STEP_SECONDS (default 130) and EVAL_SECONDS (default 150) for the two speeds,
# GPU_SECONDS (default 60) of training, documents scored: GPU_DOCS (default 0.01).
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${1:-python3}
if ! "$PYTHON" -c "import sentencepiece, zstandard, brotli, tqdm, pytest" 2>/dev/null; then
  "$PYTHON" -m pip install --quiet --no-index --find-links wheels sentencepiece zstandard brotli tqdm pytest
fi
if [ "${2:-}" != systems ]; then "$PYTHON" -m pytest -q -m gpu; fi
SHARED=$([ -d shared ] && echo shared || echo ../shared)
DATASET=corpus_sp8192
if [ -d "$SHARED/corpus" ]; then
  "$PYTHON" tools/prepare_data.py text "$SHARED/corpus/train.jsonl.zst" --val "$SHARED/corpus/val.jsonl.zst" \
    --tokenizer "$SHARED/tokenizers/fineweb_8192_bpe.model" --name corpus
else
  "$PYTHON" tools/prepare_data.py fineweb --variant sp8192 --train-shards 1
  DATASET=fineweb10B_sp8192
fi
mkdir -p bench/results
STAMP=$(date +%Y%m%d-%H%M%S)
if [ "${2:-}" = systems ]; then
  for preset in ${SYSTEMS:-pr1530 pr1560 pr1413 pr473 pr605}; do
    PRESET=$preset RUN_ID=systems_$preset DATASET=$DATASET VOCAB_SIZE=8192 MAX_WALLCLOCK_SECONDS=${GPU_SECONDS:-90} \
      VAL_DOC_FRACTION=${GPU_DOCS:-0.02} VAL_LOSS_EVERY=0 "$PYTHON" train_gpt.py
  done
  "$PYTHON" tools/report.py --compare logs/systems_*.txt | tee "bench/results/systems_$STAMP.md"
  if [ -n "${OUT:-}" ]; then cp "bench/results/systems_$STAMP.md" logs/systems_*.txt "$OUT/"; fi
  exit
fi
measure() {  # NAME SECONDS OPTIONS..: a comparison that fails or takes too long must not stop the run
  local table="bench/results/$1_$STAMP.txt"
  PRESET=record timeout "$2" "$PYTHON" -u "bench/$1.py" ${REFERENCE:+--reference "$REFERENCE"} "${@:3}" > "$table" 2>&1 \
    || echo "bench/$1.py: exit status $?" >> "$table"
  cat "$table"
  if [ -n "${OUT:-}" ]; then cp "$table" "$OUT/"; fi
}
measure step "${STEP_SECONDS:-130}" --rounds 5
measure evaluation "${EVAL_SECONDS:-150}" --batches 2
export RUN_ID="gpu_$STAMP" DATASET PRESET=record MAX_WALLCLOCK_SECONDS=${GPU_SECONDS:-60}
export VAL_DOC_FRACTION=${GPU_DOCS:-0.01} VAL_LOSS_EVERY=0 WARMUP_STEPS=2 GPTQ_CALIBRATION_BATCHES=16
"$PYTHON" train_gpt.py
{
  echo "date: $(date -u +%Y-%m-%d) commit: $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  grep -E "^(device|torch|attention|model_params|warmup|gptq|step:|layer_loop|stopping|GPTQ|diagnostic|quantized|Total|peak|phase|check|warm-up|train|calibrate|quantise|pack|score|all of|final)" "logs/$RUN_ID.txt"
} > "bench/results/$RUN_ID.txt"
cat "bench/results/$RUN_ID.txt"
if [ -n "${OUT:-}" ]; then cp "bench/results/$RUN_ID.txt" "$OUT/"; fi
