"""The settings of the smallest run that goes through all phases: for tests and tools/faults.py."""

from __future__ import annotations

# 4 control pieces, 256 bytes, the rest learnt from the text.
VOCAB = 320
TINY = {
    "PRESET": "cpu",
    "DATASET": f"tiny_sp{VOCAB}",
    "VOCAB_SIZE": str(VOCAB),
    "NUM_LAYERS": "4",
    "MODEL_DIM": "32",
    "NUM_HEADS": "2",
    "NUM_KV_HEADS": "1",
    "MLP_MULT": "2",
    "XSA_LAST_N": "4",
    "ROPE_DIMS": "8",
    "NUM_LOOPS": "1",
    "LOOP_START": "1",
    "LOOP_END": "1",
    "PARALLEL_START_LAYER": "3",
    "COMPUTE_DTYPE": "fp32",
    "WARMUP_STEPS": "1",
    "TRAIN_BATCH_TOKENS": "512",
    "MICRO_BATCH_TOKENS": "128",
    "TRAIN_SEQ_LEN": "64",
    "CU_SEQLENS_CAPACITY": "32",
    "MAX_WALLCLOCK_SECONDS": "0",
    "ITERATIONS": "6",
    "GPTQ_CALIBRATION_BATCHES": "4",
    "VAL_BATCH_TOKENS": "2048",
    "EVAL_SEQ_LEN": "64",
    "EVAL_STRIDE": "16",
    "TTT_EVAL_SEQ_LEN": "64",
    "TTT_CHUNK_SIZE": "16",
    # Warm-up adapts to twice as many tokens.
    "TTT_CHUNK_TOKENS": "512",
    "TTT_BATCH_SIZE": "4",
    "TTT_LORA_RANK": "4",
}
