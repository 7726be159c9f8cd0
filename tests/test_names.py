"""Names of variables: those of public scripts, of clusters, of launchers, and slips of the pen."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import train_gpt as tg

# Every variable that a script of openai/parameter-golf reads, those in packed scripts included.
PUBLIC_NAMES = """
    ACTIVATION ADAM_EPS ADAM_LR ADAM_WD ADAM_WEIGHT_DECAY ARTIFACT_DIR ASYMMETRIC_LOGIT
    ATTN_CLIP_SIGMAS ATTN_OUT_GATE_ENABLED ATTN_OUT_GATE_SRC ATTN_PROJ_TYPE ATTN_RES
    ATTN_VARIANT BANK_SPLIT BATCH_SCHEDULE_FRACTION BATCH_TOKENS_START BETA1 BETA2
    BIGRAM_BUCKETS BIGRAM_DIM BIGRAM_HASH BIGRAM_HASH_BUCKETS BIGRAM_HASH_DIM BIGRAM_VOCAB_SIZE
    BINARIZE_ACTIVATIONS BITNET_GROUP_SIZE BLOCK_LARS_MIN_SCALE BLOCK_LARS_TRUST BLOCK_TYPE
    CANON_AC_LAYERS CASEOPS_ENABLED CAUTIOUS_WD CE_PURE_FRAC CE_WEIGHT CHECKPOINT_DIR
    CHECKPOINT_EVERY CHURN_LOG_EVERY CLIP_MULT_EARLY CLIP_MULT_LATE CLIP_MULT_LOOP CLIP_MULT_MID
    COEFF_LR_BASE COEFF_LR_SCALE COMPILE COMPILE_MODE COMPILE_MODEL COMPRESSOR
    CONTROL_TENSOR_NAME_PATTERNS CORR_WEIGHT_LR DATASETS_DIR DATA_DIR DATA_PATH DEPTH_LORA_RANK
    DETACH_TARGETS DIFF_ATTN DISABLE_LAYER0_ATTN DTG_ENABLED D_CONV D_STATE EFFECTIVE_DEPTH
    EGGROLL_LAYERS EGGROLL_LOAD EGGROLL_LORA_RANK EGGROLL_LR EGGROLL_RANK EGGROLL_SIGMA EMA
    EMA_DECAY EMA_ENABLED EMA_START_FRACTION EMBEDDING_DIM EMBED_BITS EMBED_CLIP_SIGMAS
    EMBED_DIM EMBED_INNER_DIM EMBED_LR EMBED_WD ENABLE_LOOPING_AT ETLB_CLIP ETLB_ENABLED ETLB_LR
    ETLB_STEPS EVAL_BATCH_SEQS EVAL_BATCH_SIZE EVAL_DEPTH_RECURRENCE EVAL_NTK_ALPHA
    EVAL_ONLY_PATH EVAL_ONLY_QUANTIZED_PATH EVAL_OVERLAP EVAL_SEQ_LEN EVAL_STATE_RESET
    EVAL_STRIDE EVAL_TEMP EXPAND FITNESS_SHAPING FP16_EMBED_EXPORT FP16_KEEP_NAME_PATTERNS
    FP16_PASSTHROUGH_PATTERNS FP_STORAGE FUSED_CE_ENABLED GATED_ATTENTION GATED_ATTN
    GATED_ATTN_ENABLED GATED_ATTN_INIT_STD GATED_ATTN_QUANT_GATE GATE_ATTN_OUT GATE_ATTN_SRC
    GATE_MLP_OUT GATE_WIDTH GATE_WINDOW GDN_CONV_SIZE GDN_EXPAND_V GDN_HEAD_DIM_RATIO GDN_LAYERS
    GDN_N_HEADS GLOBAL_TTT_BATCH_SEQS GLOBAL_TTT_CHUNK_TOKENS GLOBAL_TTT_DOC_LIMIT
    GLOBAL_TTT_EPOCHS GLOBAL_TTT_GRAD_CLIP GLOBAL_TTT_LR GLOBAL_TTT_MOMENTUM
    GLOBAL_TTT_RESPECT_DOC_BOUNDARIES GLOBAL_TTT_WARMUP_CHUNKS GLOBAL_TTT_WARMUP_START_LR
    GPTQ_AR_SELFGEN GPTQ_BATCH_SIZE GPTQ_BLOCK_SIZE GPTQ_CALIBRATION_BATCHES GPTQ_CALIB_BATCHES
    GPTQ_CALIB_SAMPLES GPTQ_CLIP_SIGMAS GPTQ_DAMP GPTQ_EMBED_CLIP_SIGMAS GPTQ_ENABLED
    GPTQ_GEN_LEN GPTQ_GEN_TEMP GPTQ_LITE GPTQ_NUM_SEQS GPTQ_RESERVE_MS GPTQ_RESERVE_SECONDS
    GPTQ_TEMPERATURE GRAD_ACCUM_STEPS GRAD_CLIP_NORM HEAD_LR HESSIAN_CLIP_LAMBDA HNET_LR_DIFF
    INDEPENDENT_LR INT4_LAYERS INT4_STEP INT5_LAYERS INT6_LAYERS INT6_LAYER_END INT6_LAYER_START
    INT6_STEP INT8_FULL_RANGE_PATTERNS INT8_KEEP_FLOAT_FP32_NAME_PATTERNS ITERATIONS
    JEPA_PURE_FRAC JEPA_STEPS JEPA_WEIGHT LATENT_KV_DIM LATE_QAT LATE_QAT_THRESHOLD LAWA_ENABLED
    LAWA_FREQ LAWA_K LEGENDRE_DEGREE_ATTN LEGENDRE_DEGREE_FFN LEGENDRE_GROUPS LN_SCALE
    LOCAL_RANK LOGIT_CHUNK_TOKENS LOGIT_HEAD_TYPE LOGIT_SOFTCAP LOOP_END LOOP_LAYER_BITS
    LOOP_LAYER_CLIP_SIGMAS LOOP_PHASE2_AT LOOP_START LORA_LR LORA_RANK LQER_ASYM_ENABLED
    LQER_ASYM_GROUP LQER_ENABLED LQER_FACTOR_BITS LQER_RANK LQER_TOP_K LR_SCHEDULE LR_START
    LR_WARMUP_STEPS MAMBA3_CHUNK_SIZE MAMBA3_D_STATE MAMBA3_EXPAND MAMBA3_HEADDIM MAMBA3_NGROUPS
    MAMBA3_OUTPROJ_NORM MAMBA3_ROPE_FRACTION MATRIX_BITS MATRIX_CLIP_SIGMAS MATRIX_LR
    MATRIX_LR_EARLY MATRIX_LR_LATE MATRIX_OPTIMIZER MAX_WALLCLOCK_SECONDS MIN_LR MIXED_QUANT
    MLP_CLIP_SIGMAS MLP_EVERY MLP_GROUPS MLP_HIDDEN MLP_MULT MLP_RANK MLX_EAGER_EVAL
    MLX_MAX_MICROBATCH_TOKENS MODE MODEL_DIM MODEL_SAVE_PATH MTP_HEADS MTP_LOSS_WEIGHT
    MTP_NUM_HEADS MUON_BACKEND_STEPS MUON_BETA2 MUON_COOLDOWN_END MUON_COOLDOWN_START MUON_EQ_R
    MUON_MOMENTUM MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM_WARMUP_STEPS MUON_ROW_NORMALIZE
    MUON_WD MUON_WEIGHT_DECAY NEGATIVE_SLOPE NGRAM_AGREE_BONUS NGRAM_BASE_BETA
    NGRAM_OPEN_TABLE_BITS NGRAM_ORDER_STRIDE NGRAM_TILT_ENABLED NGRAM_WITHIN_BETA
    NGRAM_WITHIN_THRESHOLD NGRAM_WORD_BETA NGRAM_WORD_THRESHOLD NUM_ATTN_LAYERS NUM_HEADS
    NUM_KV_HEADS NUM_LAYERS NUM_LIGHT_BLOCKS NUM_LOOPS NUM_UNIQUE_BLOCKS NUM_VIRTUAL_LAYERS
    N_INT6_LAYERS OUTER_LAYERS OUT_DIR PARALLEL_FINAL_LANE PARALLEL_RESIDUAL
    PARALLEL_RESIDUAL_START PARALLEL_START_LAYER PARALLEL_START_LAYER_IS_PHYSICAL
    PHASED_TTT_ENABLED PHASED_TTT_NUM_PHASES PHASED_TTT_PREFIX_DOCS POLAR_EXPRESS POP_SIZE
    POST_GPTQ_EVAL_ONLY PREDICTOR_HIDDEN_MULT PREQUANT_ONLY PROJECTOR_TYPE PRUNE_RATIO QAT
    QAT_AFTER_STEP QAT_BITS QAT_ENABLED QAT_FRACTION QAT_INT6 QAT_START_FRAC QAT_THRESHOLD
    QK_GAIN_INIT QUANT_BITS QUANT_BITS_EMBED QUANT_BITS_MLP QUANT_CLIP_RANGE QUANT_CONFIG RANK
    RATIO_LOSS_WEIGHT RECUR_LAYERS RECUR_START_STEP REFINER REFINER_KERNEL REPEAT_UNTIE_MLP
    REPEAT_UNTIE_MLP_LAYERS RESUME_FROM ROPE_BASE ROPE_DIMS ROPE_TRAIN_SEQ_LEN ROPE_TYPE
    ROPE_YARN RUN_ID SCALAR_LR SCALE_STORAGE SEED SEQ_LEN_SCHEDULE SEQ_LEN_START
    SEQ_SCHEDULE_FRACTION SIGN_COMPRESS_REG SIGREG_KNOTS SIGREG_LAMBDA SIGREG_NUM_PROJ
    SIGREG_SCHEDULE SIGREG_WEIGHT SKIP_GATES_ENABLED SKIP_POST_TRAIN_EVAL SKIP_TOKENS
    SLIDING_BATCH_SIZE SLIDING_EVAL SLIDING_EVAL_STRIDE SLIDING_WINDOW_ENABLED SLOT_ENABLED
    SLOT_LR SLOT_STEPS SMEAR SMEAR_GATE SMEAR_GATE_ENABLED SMEAR_GATE_WIDTH SOFTCAP_TYPE
    SPARSE_ATTN_GATE_ENABLED SPARSE_ATTN_GATE_INIT_STD SPARSE_ATTN_GATE_SCALE STRIDE SWA_DECAY
    SWA_ENABLED SWA_EVERY SWA_START_FRAC SWEEP_MODE SW_EVAL_BATCH TARGET_AVG_CHUNK_LEN TARGET_MB
    TEMP_CALIB TEMP_SCALING TIED_EMBED_INIT_STD TIED_EMBED_LR TIE_EMBEDDINGS TOKENIZER
    TOKENIZER_PATH TRAINING_DEPTH_RECURRENCE TRAIN_BATCH_TOKENS TRAIN_FILES TRAIN_LOG_EVERY
    TRAIN_SEQ_LEN TRIGRAM TTT_BATCH_SEQS TTT_BATCH_SIZE TTT_BETA1 TTT_BETA2 TTT_CHUNK_SIZE
    TTT_CHUNK_TOKENS TTT_DEBUG_BYPASS TTT_DOC_LIMIT TTT_ENABLED TTT_ENTROPY_HIGH TTT_ENTROPY_LOW
    TTT_EPOCHS TTT_EVAL_BATCHES TTT_EVAL_ONLY TTT_EVAL_SEQ_LEN TTT_FREEZE_BLOCKS TTT_GRAD_CLIP
    TTT_GRAD_STEPS TTT_HEARTBEAT_SECONDS TTT_K_LORA TTT_LORA_ALPHA TTT_LORA_LR TTT_LORA_RANK
    TTT_LR TTT_MLP_LORA TTT_MOMENTUM TTT_NS_STEPS TTT_ONLY TTT_ONLY_EVAL TTT_OPTIMIZER
    TTT_OUTPUT_DIR TTT_O_LORA TTT_WARM_START_A TTT_WEIGHT_DECAY TVERSKY_FEATURE_POOLS
    TVERSKY_MEMBERSHIP TVERSKY_NUM_FEATURES UNTIE_AT_FRACTION UNTIE_LOOP_MLPS USE_BIGRAM_HASH
    USE_BROTLI USE_COMPILE USE_GPTQ USE_GRAM_NS USE_INT6 USE_INT8_KERNEL USE_LZMA USE_ORTHO_INIT
    USE_POLAR_EXPRESS USE_SMEARGATE USE_TRITON_KERNEL USE_WRAP USE_ZSTD VALUE_RESIDUAL
    VAL_BATCH_SIZE VAL_BATCH_TOKENS VAL_DOC_FRACTION VAL_FILES VAL_LOSS_EVERY VAL_MAX_BATCHES
    VAL_MAX_TOKENS VE_DIM VE_ENABLED VE_LAYERS VOCAB_SIZE WARMDOWN_FRAC WARMDOWN_FRACTION
    WARMDOWN_ITERS WARMDOWN_SHAPE WARMUP_STEPS WD_TAPER_FINAL_MULT WD_TAPER_START_FRAC
    WEIGHT_DECAY WORLD_SIZE WRAP_INIT_SCALE XNOR_GROUP_SIZE XSA_LAST_N YARN_MAX_LEN ZSTD_LEVEL
""".split()
# Names of published command lines and bug reports that no script there reads.
REPORTED_NAMES = ["TRAIN_BATCH_SIZE", "LEARNING_RATE", "EVAL_TEMPERATURE"]
LAUNCH_NAMES = {"RANK", "LOCAL_RANK", "WORLD_SIZE"}


def config(**environ: str) -> tuple[tg.Config, dict[str, str]]:
    """The config that the environment asks for on a CPU, and the origin of each field."""
    return tg.Config.from_env(environ, has_cuda=False)


def refusals(**environ: str) -> list[str]:
    """The lines with which a configuration is refused."""
    with pytest.raises(tg.UsageError) as error:
        config(**environ)
    return str(error.value).splitlines()


def idle(**environ: str) -> list[str]:
    """The lines on knobs that have no effect."""
    cfg, origin = config(**environ)
    return list(cfg.warnings_of_idle_knobs(origin))


# --- Public scripts ---
def answer(name: str) -> str:
    """What the program makes of a name that is set to 1."""
    if name.lower() in tg.FIELDS or name in tg.ALIASES:
        return "knob"
    if name in tg.SWITCHES:
        return "switch"
    (line,) = [*tg.problems_of_names({name: "1"}), *tg.warnings_of_names({name: "1"})]
    assert line.startswith(f"{name}=1: not a knob of this program; ") and len(line) < 160
    return "reason"


def test_every_name_that_a_public_script_reads_is_a_knob_or_answered_with_a_reason():
    assert len(PUBLIC_NAMES) > 400
    answers = [answer(name) for name in {*PUBLIC_NAMES, *REPORTED_NAMES} - LAUNCH_NAMES]
    assert answers.count("knob") >= 130


def test_a_path_to_shards_is_refused_with_the_knobs_that_name_them():
    for name in ("DATA_PATH", "TRAIN_FILES"):
        (line,) = refusals(**{name: "./mine/datasets/fineweb10B_sp1024/fineweb_train_*.bin"})
        assert line.endswith("; set DATA_DIR=mine DATASET=fineweb10B_sp1024")
        (line,) = refusals(**{name: "/datasets/hf/data/datasets/mine"})
        assert line.endswith("; set DATA_DIR=/datasets/hf/data DATASET=mine")
        for path in ("./shards", "./datasets/x_train_*.bin"):
            (line,) = refusals(**{name: path})
            assert line.endswith("; set DATA_DIR, DATASET")
    # Names of others.
    config(TRAIN_FILE="x", VAL_FILE="x")


def test_a_name_that_begins_as_a_family_of_knobs_does_is_warned_of():
    (line,) = tg.warnings_of_names({"TTT_RANK": "5", "OTHER_RANK": "5", "TTT_LORA_RANK": "4"})
    assert line == "TTT_RANK=5: not a knob of this program; --knobs TTT lists those"


def test_no_knob_is_also_listed_as_absent():
    for name in [*(name.upper() for name in tg.FIELDS), *tg.ALIASES, *tg.SWITCHES]:
        assert not tg.reason_in(tg.ABSENT, name), name
        assert not tg.reason_in(tg.WARNED, name), name


def test_every_remedy_names_knobs_that_exist():
    tables = [tg.REJECTED_NAMES.values(), tg.ABSENT, tg.WARNED]
    tables.append([remedy for _, remedy in tg.SWITCHES.values()])
    for reason in [reason for table in tables for reason in table]:
        if reason.startswith("set "):
            first = reason.split()[1].strip(",;").split("=")[0]
            assert first.lower() in tg.FIELDS, reason
    assert {name.lower() for name in tg.ALIASES.values()} <= tg.FIELDS.keys()
    cfg, _ = config()
    assert all(hasattr(cfg, attribute) for attribute, _ in tg.SWITCHES.values())


@pytest.mark.parametrize(
    ("theirs", "text", "field", "value"),
    [
        ("MUON_WEIGHT_DECAY", "0.04", "muon_wd", 0.04),
        ("ADAM_WEIGHT_DECAY", "0.04", "adam_wd", 0.04),
        ("MUON_EQ_R", "0", "muon_row_normalize", False),
        ("SLIDING_EVAL_STRIDE", "16", "eval_stride", 16),
        ("EVAL_TEMP", "0.9", "logit_temperature", 0.9),
        ("FUSED_CE_ENABLED", "0", "fused_ce", False),
        ("SMEAR_GATE", "1", "smear_gate_enabled", True),
    ],
)
def test_published_spelling_sets_the_knob(theirs, text, field, value):
    cfg, origin = config(**{theirs: text})
    assert (getattr(cfg, field), origin[field]) == (value, "env")


def test_beginning_of_a_knobs_name_is_refused_with_the_knob():
    assert refusals(MAX_WALLCLOCK="60") == [
        "MAX_WALLCLOCK=60: not a knob; did you mean MAX_WALLCLOCK_SECONDS?"
    ]


def test_switch_that_agrees_is_accepted_and_another_value_refused():
    for name in ("TIE_EMBEDDINGS", "EMA_ENABLED"):
        config(**{name: "1"})
        assert len(refusals(**{name: "0"})) == 1
    config(EMA_ENABLED="0", EXPORT_WEIGHTS="raw")


def test_knob_in_small_letters_is_refused_and_a_clusters_variable_is_not():
    assert refusals(matrix_lr="0.03") == [
        "matrix_lr=0.03: not a knob; names are in capitals: MATRIX_LR"
    ]
    # It could not be the knob's value.
    cfg, _ = config(seed="of the cluster")
    assert cfg.seed == tg.Config().seed


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("PHASED_TTT_ENABLED", "set PHASED_TTT_NUM_PHASES"),
        ("RECUR_LAYERS", "set NUM_LOOPS"),
        ("PARALLEL_RESIDUAL_START", "set PARALLEL_START_LAYER"),
        ("TRAIN_BATCH_SIZE", "set TRAIN_BATCH_TOKENS"),
        ("GPTQ_RESERVE_MS", "set GPTQ_RESERVE_SECONDS"),
        ("CASEOPS_ENABLED", "set DATASET"),
        ("LQER_FACTOR_BITS", "PR #1797"),
        ("MAMBA3_NEW_KNOB", "#1644"),
        ("SLOT_STEPS", "PR #1209"),
    ],
)
def test_part_that_is_not_here_is_refused_with_the_remedy_or_the_pr(name, reason):
    (line,) = refusals(DATASET="plain_sp1024", **{name: "3"})
    assert line.startswith(f"{name}=3: not a knob of this program; ") and reason in line


@pytest.mark.parametrize(
    "name", ["LQER_ENABLED", "DTG_ENABLED", "GATED_ATTN_ENABLED", "SLOT_ENABLED"]
)
@pytest.mark.parametrize("text", ["0", "", "False"])
def test_part_that_is_not_here_may_be_switched_off(name, text):
    assert config(**{name: text}) == config()


def test_switch_that_agrees_with_its_knob_is_accepted():
    assert config(PHASED_TTT_ENABLED="1", PHASED_TTT_NUM_PHASES="3")
    assert config(CASEOPS_ENABLED="1", DATASET="mine_sp1024_caseops")
    (line,) = refusals(CASEOPS_ENABLED="0", DATASET="mine_sp1024_caseops")
    assert line == "CASEOPS_ENABLED=0: not a knob of this program; set DATASET"


# --- Clusters ---
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("DATASETS", "/store/ds"),
        ("MODEL_DIR", "/opt/ml/model"),
        ("DATASET_PATH", "/mnt/x"),
        ("LEARNING_RATE", "1e-3"),
        ("WEIGHT_DECAY", "0.1"),
        ("MODE", "train"),
    ],
)
def test_name_that_a_cluster_may_set_is_only_warned_of(name, text):
    assert config(**{name: text}) == config()
    (line,) = tg.warnings_of_names({name: text})
    assert line.startswith(f"{name}={text}: not a knob of this program; ")


@pytest.mark.parametrize(
    ("name", "text"), [("MODEL_DIMS", "/opt/model"), ("SEEDS", "a,b"), ("DATASETT", "/mnt/data")]
)
def test_name_near_a_knob_with_a_value_that_the_knob_cannot_have_is_left_alone(name, text):
    assert config(**{name: text}) == config()


@pytest.mark.parametrize(
    ("name", "text", "meant"),
    [
        ("MODEL_DIMS", "256", "MODEL_DIM"),
        ("DATASETT", "mine", "DATASET"),
        ("DATA_DIRS", "/x", "DATA_DIR"),
    ],
)
def test_slip_of_the_pen_still_stops_the_run(name, text, meant):
    assert refusals(**{name: text}) == [f"{name}={text}: not a knob; did you mean {meant}?"]


# --- Knobs without effect ---
@pytest.mark.parametrize(
    ("environ", "line"),
    [
        (
            {"PRESET": "pr1530", "PHASED_TTT_PREFIX_DOCS": "2000", "TTT_LR": "0.1"},
            "PHASED_TTT_PREFIX_DOCS, TTT_LR: no effect with"
            " TTT_MODE=document PHASED_TTT_NUM_PHASES=0",
        ),
        ({"TILT_BETA": "2"}, "TILT_BETA: no effect with TILT_ORDER=0"),
        ({"EVAL_STRIDE": "32"}, "EVAL_STRIDE: no effect with SLIDING_WINDOW_ENABLED=0"),
        ({"SWA_EVERY": "10"}, "SWA_EVERY: no effect with EXPORT_WEIGHTS=ema"),
        ({"BIGRAM_DIM": "64"}, "BIGRAM_DIM: no effect with BIGRAM_VOCAB_SIZE=0"),
        (
            {"PRESET": "pr1413", "TTT_LORA_RANK": "8"},
            "TTT_LORA_RANK: no effect with TTT_MODE=chunk",
        ),
        ({"TTT_ENABLED": "0", "TTT_LORA_RANK": "8"}, "TTT_LORA_RANK: no effect with TTT_ENABLED=0"),
        ({"NUM_LOOPS": "0", "LOOP_START": "3"}, "LOOP_START: no effect with NUM_LOOPS=0"),
    ],
)
def test_knob_whose_switch_is_off_is_named(environ, line):
    assert idle(**environ) == [line]


def test_knob_whose_switch_is_on_is_not_named():
    assert (
        idle(PRESET="record", PHASED_TTT_PREFIX_TOKENS="100", TILT_BETA="2", LOOP_START="3") == []
    )
    assert idle(TTT_ENABLED="0", NUM_LOOPS="0", PARALLEL_START_LAYER="0") == []


# --- A knob that the model file would not hold ---
def test_knob_that_changes_the_network_but_is_not_stored_stops_the_run(monkeypatch):
    table = tg.parameter_table

    def wider(cfg: tg.Config) -> dict[str, tg.Role]:
        """A network in which EMA_EVERY, of all knobs, adds a parameter."""
        return table(cfg) | ({"new": tg.Role((cfg.ema_every, 8), 0.0)} if cfg.ema_every > 1 else {})

    monkeypatch.setattr(tg, "parameter_table", wider)
    assert config(EMA_EVERY="1")
    (line,) = refusals(EMA_EVERY="3")
    assert line.startswith("EMA_EVERY=3: must be 1, or a knob with network=True")


# --- Launchers ---
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("changed", "start"),
    [
        ({"MASTER_ADDR": None}, "RANK=0: needs MASTER_ADDR; start with torchrun"),
        ({"MASTER_PORT": None}, "RANK=0: needs MASTER_PORT; start with torchrun"),
        ({"WORLD_SIZE": None}, "RANK=0: needs WORLD_SIZE; start with torchrun"),
        ({"RANK": "1"}, "RANK=1: must be below WORLD_SIZE=1"),
        ({"RANK": "x"}, "RANK=x: must be a whole number"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK=: must be a whole number"),
    ],
)
def test_launch_variable_that_cannot_be_right_is_named(changed, start):
    environ = {name: text for name, text in (TORCHRUN | changed).items() if text is not None}
    with pytest.raises(tg.UsageError) as error:
        tg.Ranks(environ)
    assert str(error.value).startswith(start)


@pytest.mark.parametrize("rank", ["x", "1", "5"])
def test_rank_that_cannot_be_right_says_so_itself(monkeypatch, capsys, rank):
    monkeypatch.setattr(tg, "handle_signals", lambda handler: None)
    found = config()
    monkeypatch.setattr(tg.Config, "from_env", lambda *_: found)
    for name, text in (TORCHRUN | {"RANK": rank}).items():
        monkeypatch.setenv(name, text)
    assert tg.main([]) == 2
    assert capsys.readouterr().err.startswith(f"train_gpt.py: RANK={rank}: must be ")


@pytest.mark.parametrize("size", ["64", "", "64(x2)"])
def test_without_rank_the_world_size_of_a_cluster_means_nothing(size):
    assert tg.launch_numbers({"WORLD_SIZE": size}) == (0, 1, 0)


def test_more_ranks_than_gpus_are_refused_by_the_first_rank_without_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    messages = []
    for local_rank in ("2", "3"):
        with pytest.raises(tg.BadRank) as error:
            tg.Ranks({"LOCAL_RANK": local_rank})
        messages.append(str(error.value))
    assert messages[0].startswith(
        "LOCAL_RANK=2: this machine has 2 GPUs; start torchrun with --nproc"
    )
    assert messages[1] == ""


# --- Memory ---
@pytest.mark.parametrize(
    ("phase", "knob"),
    [
        ("train", "MICRO_BATCH_TOKENS=2048"),
        ("calibrate", "MICRO_BATCH_TOKENS=2048"),
        ("warm-up", "TTT_BATCH_SIZE=16"),
        ("score quantized", "VAL_BATCH_TOKENS=65536"),
        ("score quantized_ttt_lora", "TTT_BATCH_SIZE=16"),
    ],
)
def test_lack_of_memory_ends_in_a_line_with_the_knob_to_lower(monkeypatch, capsys, phase, knob):
    class Starved(tg.Run):
        """A run that begins in `phase`, where memory runs out."""

        def __init__(self, cfg: tg.Config, origin: dict, ranks: tg.Ranks, warnings: object):
            self.cfg, self.ranks = cfg, ranks
            self.excluded_seconds = 0.0
            self.log = tg.Log(None, is_main=False)

        def go(self) -> None:
            """Runs out of memory."""
            with self.phase(phase, budget="none"):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(tg, "Run", Starved)
    assert tg.main([]) == 1
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"out of memory in {phase}; lower" in line and knob in line


# --- Folders ---
def test_folder_of_logs_that_cannot_be_written_is_named_and_run_id_is_not_blamed(monkeypatch):
    cfg = dataclasses.replace(config()[0], artifact_dir="/tmp")
    monkeypatch.setattr(tg, "can_be_written", lambda path, is_file=False: path.parts[0] != "logs")
    for run_id in ("", "mine"):
        with pytest.raises(tg.UsageError) as error:
            tg.check_paths(dataclasses.replace(cfg, run_id=run_id))
        assert str(error.value).startswith("logs: cannot be written; ")


def test_run_id_that_is_too_long_for_a_file_is_blamed(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    cfg = dataclasses.replace(config()[0], run_id="x" * 250)
    with pytest.raises(tg.UsageError) as error:
        tg.check_paths(cfg)
    assert str(error.value).startswith("RUN_ID=xxx")
