"""Configuration: defaults, origins, refusals by name and value; what the file promises."""

import ast
import dataclasses
import importlib.machinery
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, tiny_config

import train_gpt as tg

FIELDS = dataclasses.fields(tg.Config)
NUMBERS = [f for f in FIELDS if type(f.default) in (int, float)]
CHOICES = [f for f in FIELDS if f.metadata["choices"]]
BOUNDS = [(f, type(f.default)(f.metadata["lo"]), -math.inf) for f in NUMBERS]
BOUNDS += [(f, type(f.default)(f.metadata["hi"]), math.inf) for f in NUMBERS]
TREE = ast.parse((ROOT / "train_gpt.py").read_text(encoding="utf-8"))
FUNCTIONS = [
    node for node in ast.walk(TREE) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
]


def refusals(**environ):
    """The lines of the UsageError for these variables, over the cpu preset."""
    with pytest.raises(tg.UsageError) as caught:
        tg.Config.from_env({"PRESET": "cpu", **environ}, has_cuda=False)
    return str(caught.value).splitlines()


def preset(name):
    """The config of a preset by itself, without a look at the environment."""
    return tg.Config(**{**tg.PRESETS[name], "preset": name})


# --- Defaults and origins ---

# The defaults of PR #1530's script, for every knob that is also one here.
PUBLISHED = dict(
    seed=1337,
    artifact_dir="",
    eval_only_path="",
    iterations=20000,
    max_wallclock_seconds=600,
    gptq_reserve_seconds=13,
    warmdown_frac=0.72,
    min_lr=0,
    train_batch_tokens=786432,
    micro_batch_tokens=98304,
    train_seq_len=2048,
    train_log_every=500,
    val_loss_every=4000,
    val_batch_tokens=524288,
    eval_seq_len=2048,
    eval_stride=64,
    sliding_window_enabled=False,
    vocab_size=8192,
    num_layers=11,
    model_dim=512,
    num_heads=8,
    num_kv_heads=4,
    mlp_mult=4,
    xsa_last_n=11,
    skip_gates_enabled=True,
    logit_softcap=30,
    rope_base=10000,
    rope_dims=16,
    ln_scale=True,
    qk_gain_init=5,
    num_loops=2,
    loop_start=3,
    loop_end=5,
    enable_looping_at=0.35,
    parallel_start_layer=8,
    parallel_final_lane="mean",
    tied_embed_lr=0.03,
    tied_embed_init_std=0.005,
    matrix_lr=0.022,
    scalar_lr=0.02,
    muon_momentum=0.97,
    muon_momentum_warmup_start=0.92,
    muon_momentum_warmup_steps=1500,
    muon_backend_steps=5,
    muon_row_normalize=True,
    beta1=0.9,
    beta2=0.95,
    adam_eps=1e-8,
    grad_clip_norm=0.3,
    adam_wd=0.02,
    muon_wd=0.095,
    embed_wd=0.085,
    ema_decay=0.9965,
    compressor="brotli",
    gptq_calibration_batches=64,
    matrix_bits=6,
    embed_bits=8,
    matrix_clip_sigmas=12.85,
    embed_clip_sigmas=20,
    ttt_enabled=True,
    ttt_lora_rank=96,
    ttt_lora_lr=1e-4,
    ttt_chunk_size=32,
    ttt_eval_seq_len=2048,
    ttt_batch_size=64,
    ttt_grad_steps=1,
    ttt_weight_decay=0.5,
    ttt_beta1=0,
    ttt_beta2=0.999,
    ttt_k_lora=True,
    ttt_mlp_lora=True,
    ttt_o_lora=True,
    ttt_optimizer="adam",
    val_doc_fraction=1,
)
# PR #1530's script with these settings.
PR1560 = PUBLISHED | dict(warmdown_frac=0.75, ttt_chunk_size=48)
# What the published runs of PR #473, #1413 and #605 have in common, by their logs.
SEEDS = dict(
    num_layers=11,
    model_dim=512,
    num_heads=8,
    num_kv_heads=4,
    tied_embed_init_std=0.005,
    logit_softcap=30,
    train_batch_tokens=786432,
    max_wallclock_seconds=600,
    min_lr=0,
    muon_momentum=0.99,
    muon_momentum_warmup_start=0.92,
    muon_momentum_warmup_steps=1500,
    muon_backend_steps=5,
    beta1=0.9,
    beta2=0.95,
    adam_eps=1e-8,
    grad_clip_norm=0.3,
    matrix_bits=6,
    embed_bits=8,
    eval_seq_len=2048,
    eval_stride=64,
    ttt_momentum=0.9,
    ttt_chunk_tokens=32768,
    ttt_batch_seqs=32,
    ttt_grad_clip=1,
    ttt_freeze_blocks=0,
    parallel_start_layer=0,
    artifact_limit_bytes=0,
)
PR473 = SEEDS | dict(
    vocab_size=1024,
    data_loader="rows",
    train_seq_len=2048,
    iterations=9000,
    mlp_mult=3,
    leaky_slope=0,
    xsa_last_n=4,
    qk_gain_init=1.5,
    skip_gates_enabled=False,
    num_loops=0,
    rope_base=10000,
    rope_dims=16,
    rope_train_seq_len=1024,
    ln_scale=True,
    bigram_vocab_size=3072,
    bigram_dim=128,
    smear_enabled=True,
    ve_enabled=True,
    ve_dim=128,
    ve_layers="9,10",
    tied_embed_lr=0.035,
    matrix_lr=0.025,
    scalar_lr=0.025,
    muon_row_normalize=False,
    muon_wd=0.04,
    adam_wd=0.04,
    embed_wd=0.04,
    warmdown_iters=3500,
    ema_decay=0.997,
    export_weights="ema",
    late_qat=False,
    quantizer="gptq_lite",
    compressor="lzma",
    prune_frac=0,
    sliding_window_enabled=True,
    ttt_mode="chunk",
    ttt_lr=0.002,
    ttt_epochs=3,
)
PR1413 = SEEDS | dict(
    vocab_size=8192,
    data_loader="shuffled",
    train_seq_len=2048,
    mlp_mult=4,
    leaky_slope=0.5,
    xsa_last_n=11,
    qk_gain_init=5,
    skip_gates_enabled=True,
    num_loops=2,
    loop_start=4,
    loop_end=5,
    enable_looping_at=0.5,
    bigram_vocab_size=0,
    smear_enabled=False,
    ve_enabled=False,
    tied_embed_lr=0.03,
    matrix_lr=0.02,
    scalar_lr=0.02,
    muon_row_normalize=True,
    muon_wd=0.085,
    adam_wd=0.02,
    embed_wd=0.085,
    warmdown_frac=0.667,
    warmdown_iters=0,
    gptq_reserve_seconds=12,
    ema_decay=0.997,
    quantizer="gptq",
    compressor="brotli",
    matrix_clip_sigmas=12.85,
    embed_clip_sigmas=20,
    gptq_calibration_batches=64,
    sliding_window_enabled=True,
    ttt_mode="chunk",
    ttt_lr=0.005,
    ttt_epochs=3,
)
PR605 = SEEDS | dict(
    vocab_size=1024,
    data_loader="rows",
    train_seq_len=1024,
    mlp_mult=3,
    leaky_slope=0,
    xsa_last_n=0,
    qk_gain_init=1.5,
    skip_gates_enabled=False,
    num_loops=0,
    rope_base=50000,
    rope_dims=0,
    rope_train_seq_len=1024,
    ln_scale=False,
    branch_scale=True,
    bigram_vocab_size=2048,
    smear_enabled=True,
    train_input_features=False,
    ve_enabled=False,
    tied_embed_lr=0.03,
    matrix_lr=0.02,
    scalar_lr=0.02,
    muon_row_normalize=False,
    muon_wd=0.04,
    adam_wd=0.04,
    embed_wd=0.04,
    warmdown_iters=3000,
    ema_decay=0.999,
    ema_every=10,
    export_weights="swa",
    swa_threshold=0.2,
    swa_every=50,
    prune_frac=0.04,
    quantizer="int6",
    tables_fp16=True,
    compressor="zstd",
    ttt_mode="document",
    ttt_lora_rank=8,
    ttt_lm_rank=16,
    ttt_q_lora=True,
    ttt_v_lora=True,
    ttt_k_lora=False,
    ttt_o_lora=False,
    ttt_mlp_lora=False,
    ttt_lora_lr=0.01,
    ttt_lr_factors="q:0.5,v:1.5,head:2,bias:3",
    ttt_bias_tune=True,
    ttt_beta1=0.9,
    ttt_beta2=0.95,
    ttt_weight_decay=0,
    ttt_chunk_size=256,
    ttt_eval_seq_len=1024,
    ttt_batch_size=64,
    ttt_min_doc_len=512,
    eval_deadline_seconds=550,
    ttt_epochs=1,
    # The legal form: the published run's temperature was chosen by validation scores.
    logit_temperature=1,
)
# The commands of their READMEs and, where those are silent, the defaults of their scripts. What the
# presets change on purpose is in docs/presets.md.
PR1855 = PUBLISHED | dict(
    min_lr=0.1,
    matrix_lr=0.026,
    warmdown_frac=0.85,
    beta2=0.99,
    muon_coeffs="polar",
    sparse_attn_gate_enabled=True,
    dataset="fineweb10B_sp8192_lossless_caps_caseops_v1_reserved",
    sparse_attn_gate_scale=0.5,
    smear_gate_enabled=True,
    gate_window=12,
    val_loss_every=0,
    gptq_reserve_seconds=-1,
    gptq_calibration_batches=16,
    quantizer="gptq",
    column_scales=False,
    embed_bits=7,
    mlp_clip_sigmas=11.5,
    attn_clip_sigmas=13,
    embed_clip_sigmas=14,
    compressor="ans",
    ttt_chunk_size=48,
    ttt_lora_rank=80,
    ttt_lora_alpha=144,
    ttt_warm_start_a=True,
    ttt_beta2=0.99,
    ttt_q_lora=True,
    ttt_v_lora=True,
    phased_ttt_num_phases=3,
    phased_ttt_prefix_tokens=9_470_000,
    ttt_lr=0.001,
    ttt_momentum=0.9,
    ttt_epochs=1,
    ttt_chunk_tokens=32768,
    ttt_batch_seqs=32,
    ttt_grad_clip=1,
)
PR2014 = PR1855 | dict(
    train_seq_len=3072,
    seq_len_schedule="0:1024,0.1:2048,0.7:3072",
    qk_gain_init=5.25,
    eval_seq_len=3072,
    ttt_eval_seq_len=3072,
    ttt_batch_size=24,
    ttt_short_chunks="256:8,2000:24",
    ttt_lora_lr=0.75e-4,
    ttt_q_lora=False,
    ttt_v_lora=False,
    phased_ttt_num_phases=1,
)
PR2135 = PR1855 | dict(
    matrix_lr=0.028,
    eval_seq_len=2560,
    ttt_eval_seq_len=2560,
    ttt_lora_lr=8e-5,
    ttt_weight_decay=2,
    ttt_k_lora=False,
    phased_ttt_num_phases=1,
    gptq_calibration_batches=32,
    tilt_order=16,
    tilt_threshold=0.8,
    tilt_beta=2.625,
    tilt_gamma=0,
    tilt_hedge="",
)
RECORD = PR2135 | dict(quantizer="allocated", column_scales=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pr1530", PUBLISHED),
        ("pr1560", PR1560),
        ("record", RECORD),
        ("pr473", PR473),
        ("pr1413", PR1413),
        ("pr605", PR605),
        ("pr1855", PR1855),
        ("pr2014", PR2014),
        ("pr2135", PR2135),
    ],
)
def test_presets_hold_the_published_values(name, expected):
    values = dataclasses.asdict(preset(name))
    assert {k: (v, values[k]) for k, v in expected.items() if values[k] != v} == {}


def test_cuda_selects_record_and_no_cuda_selects_cpu():
    for has_cuda, name in ((True, "record"), (False, "cpu")):
        cfg, origin = tg.Config.from_env({}, has_cuda)
        assert cfg == preset(name)
        assert set(origin.values()) <= {"default", "preset"}


@pytest.mark.parametrize("name", tg.PRESETS)
def test_every_preset_is_valid(name):
    assert preset(name).problems() == []


@pytest.mark.parametrize(
    ("name", "changed", "count"),
    [
        ("pr473", {}, 27_124_828),
        ("pr473", {"bigram_vocab_size": 1536}, 26_928_220),
        ("pr473", {"bigram_vocab_size": 2048}, 26_993_756),
        ("pr1413", {}, 35_943_512),
        ("pr605", {}, 26_829_913),
        ("pr1530", {}, 35_944_602),
        ("record", {}, 35_945_671),
        ("pr1855", {}, 35_945_671),
    ],
)
def test_networks_have_as_many_parameters_as_the_published_logs_say(name, changed, count):
    cfg = dataclasses.replace(preset(name), **changed)
    assert sum(math.prod(role.shape) for role in tg.parameter_table(cfg).values()) == count


@pytest.mark.parametrize("name", [name for name in tg.PRESETS if name != "cpu"])
def test_shrunk_preset_keeps_its_structure(name):
    """Layers, their order, features and ratios of lengths stay; only sizes and times differ."""
    full = preset(name)
    small, _ = tg.Config.from_env({"PRESET": name, "SHRINK": "1"}, has_cuda=False)
    sizes = {*tg.SHRINK, *tg.SHRUNK_LENGTHS}
    changed = {k for k, v in dataclasses.asdict(full).items() if getattr(small, k) != v}
    assert changed <= sizes | {"shrink"}
    assert small.plans == full.plans
    assert tg.parameter_table(small).keys() == tg.parameter_table(full).keys()
    for field in sizes - {"compile", "dataset", "ttt_buckets"}:
        assert bool(getattr(small, field)) == bool(getattr(full, field)), field
    assert small.train_seq_len * full.eval_seq_len == small.eval_seq_len * full.train_seq_len
    assert small.shrink and small.model_dim == 128


def test_environment_overrides_preset_overrides_default():
    cfg, origin = tg.Config.from_env(
        {"PRESET": "cpu", "MATRIX_LR": "0.5", "SEED": "7", "COMPILE": "1"}, has_cuda=True
    )
    assert (cfg.preset, cfg.matrix_lr, cfg.seed, cfg.compile) == ("cpu", 0.5, 7, True)
    assert (cfg.num_layers, cfg.beta1) == (tg.PRESETS["cpu"]["num_layers"], 0.9)
    expected = {f.name: "preset" if f.name in tg.PRESETS["cpu"] else "default" for f in FIELDS}
    assert origin == expected | dict.fromkeys(("preset", "matrix_lr", "seed", "compile"), "env")


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny_config().seed = 2


# --- Single values ---


@pytest.mark.parametrize(
    ("field", "bound", "outward"), BOUNDS, ids=lambda x: getattr(x, "name", str(x))
)
def test_value_past_its_bound_is_refused_by_name_and_the_bound_itself_is_in_range(
    field, bound, outward
):
    name = field.name.upper()
    if isinstance(bound, float):
        past = math.nextafter(bound, outward)
    else:
        past = bound + int(math.copysign(1, outward))
    (line,) = refusals(**{name: str(past)})
    lo, hi = field.metadata["lo"], field.metadata["hi"]
    allowed = f"{lo:g}..{hi:g}" if hi < tg.NO_LIMIT else f"at least {lo:g}"
    assert line == f"{name}={past}: must be {allowed}"
    assert [*dataclasses.replace(preset("cpu"), **{field.name: bound}).out_of_range()] == []


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
def test_numbers_that_are_not_finite_are_refused(text):
    names = [f.name.upper() for f in NUMBERS if type(f.default) is float]
    assert [line.split(": must be ")[0] for line in refusals(**dict.fromkeys(names, text))] == [
        f"{name}={float(text)}" for name in names
    ]


@pytest.mark.parametrize(
    ("kind", "texts", "expected"),
    [
        (bool, ("", "2", "true", "True", "yes", "-1", " 1"), "0 or 1"),
        (int, ("", "1.5", "1e3", "many"), "a whole number"),
        (float, ("", "1,5", "fast"), "a number"),
    ],
)
def test_text_of_the_wrong_kind_is_refused(kind, texts, expected):
    for field in (f for f in FIELDS if type(f.default) is kind):
        for text in texts:
            assert refusals(**{field.name.upper(): text}) == [
                f"{field.name.upper()}={text}: must be {expected}"
            ]


def test_bools_are_0_and_1():
    # LN_SCALE and BRANCH_SCALE exclude each other, and so do the two smears.
    others = ("ln_scale", "smear_gate_enabled")
    names = [f.name for f in FIELDS if type(f.default) is bool and f.name not in others]
    fine = {"PRESET": "cpu", "LN_SCALE": "0", "VE_LAYERS": "1"}
    for text, value in (("0", False), ("1", True)):
        given = {name.upper(): text for name in names}
        cfg, _ = tg.Config.from_env({**fine, **given}, has_cuda=False)
        assert {n: getattr(cfg, n) for n in names} == dict.fromkeys(names, value)


@pytest.mark.parametrize("field", CHOICES, ids=lambda f: f.name)
def test_unknown_choice_is_refused_and_the_choices_are_named(field):
    name, choices = field.name.upper(), ", ".join(field.metadata["choices"])
    assert refusals(**{name: "Nonsense"}) == [f"{name}=Nonsense: must be one of {choices}"]


def test_unknown_preset_is_refused_with_the_presets_named():
    assert refusals(PRESET="fast") == [f"PRESET=fast: must be one of {', '.join(tg.PRESETS)}"]
    both = refusals(PRESET="fast", NUM_LAYERS="six")
    assert [line.split("=")[0] for line in both] == ["NUM_LAYERS", "PRESET"]


def test_a_refused_value_that_the_user_has_not_set_is_shown_with_its_origin():
    lines = refusals(PRESET="cpu", NUM_LAYERS="4")
    assert [line.partition(": must be ")[0] for line in lines] == [
        "XSA_LAST_N=6, from PRESET=cpu",
        "PARALLEL_START_LAYER=4, from PRESET=cpu",
    ]
    (line,) = refusals(PRESET="cpu", NUM_HEADS="7")
    assert line.startswith("MODEL_DIM=192, from PRESET=cpu: must be a multiple of 14")
    (line,) = refusals(PRESET="cpu", BIGRAM_VOCAB_SIZE="1")
    assert line.startswith("BIGRAM_VOCAB_SIZE=1: must be")


def test_all_problems_are_reported_at_once():
    wrong = dict(
        SEED="-1", MATRX_LR="1", COMPILE="maybe", TIE_EMBEDDINGS="0", BETA1="nan", COMPRESSOR="zip"
    )
    assert sorted(line.split("=")[0] for line in refusals(**wrong)) == sorted(wrong)


# --- Names ---


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("MATRX_LR", "MATRIX_LR"),
        ("NUM_LAYER", "NUM_LAYERS"),
        ("TTT_CHUNKSIZE", "TTT_CHUNK_SIZE"),
        ("ITERATION", "ITERATIONS"),
        ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"),
        ("EVAL_STRIDES", "EVAL_STRIDE"),
        ("WARM_DOWN_FRAC", "WARMDOWN_FRAC"),
        ("GLOBAL_TTT_LRS", "GLOBAL_TTT_LR"),
        ("GLOBAL_TT_EPOCHS", "GLOBAL_TTT_EPOCHS"),
    ],
)
def test_misspelt_knob_gets_the_suggestion(wrong, meant):
    assert refusals(**{wrong: "3"}) == [f"{wrong}=3: not a knob; did you mean {meant}?"]


def test_unrelated_variables_are_left_alone():
    names = """
        PATH HOME USER LOGNAME SHELL LANG LC_ALL TERM PWD OLDPWD TMPDIR HOSTNAME EDITOR DISPLAY
        PYTHONPATH PYTHONHASHSEED PYTHONUNBUFFERED VIRTUAL_ENV CONDA_PREFIX LD_LIBRARY_PATH CC CXX
        CFLAGS MAKEFLAGS CUDA_HOME CUDA_VISIBLE_DEVICES CUDA_LAUNCH_BLOCKING
        NVIDIA_VISIBLE_DEVICES OMP_NUM_THREADS MKL_NUM_THREADS OPENBLAS_NUM_THREADS
        NUMEXPR_MAX_THREADS RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK
        GROUP_WORLD_SIZE ROLE_RANK ROLE_NAME ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT
        TORCHELASTIC_RUN_ID TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RESTART_COUNT TORCH_LOGS
        TORCHELASTIC_USE_AGENT_STORE TORCH_NCCL_ASYNC_ERROR_HANDLING NCCL_DEBUG NCCL_SOCKET_IFNAME
        NCCL_P2P_DISABLE TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR TRITON_INTERPRET
        PYTORCH_CUDA_ALLOC_CONF HF_HOME HF_TOKEN WANDB_MODE SLURM_JOB_ID SLURM_NTASKS SLURM_PROCID
        GITHUB_RUN_ID GITHUB_SHA RUNNER_TEMP CI TZ SHLVL HISTSIZE MAIL
    """.split()
    assert tg.Config.from_env(dict.fromkeys(names, "x"), has_cuda=False)[0] == preset("cpu")


@pytest.mark.parametrize(
    "name",
    [
        "EMBEDDING_DIM",
        "EMBED_LR",
        "HEAD_LR",
        "ROPE_YARN",
        "MUON_BETA2",
        "CONTROL_TENSOR_NAME_PATTERNS",
        "TTT_DEBUG_BYPASS",
        "TTT_EVAL_BATCHES",
        "TTT_OUTPUT_DIR",
    ],
)
def test_published_knob_that_does_nothing_here_is_refused(name):
    """Silence would promise what it did there, even for its published default."""
    (line,) = refusals(**{name: "1"})
    assert line.startswith(f"{name}=1: not a knob of this program; ")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("TTT_TEMP_RESCALE", "a factor on the nats is no probability (ruling on PR #605)"),
        ("TTT_MIN_NLL", "the best of several passes is chosen by the answer (ruling on PR #605)"),
        ("TTT_COSINE_LR", "reveals its length; set TTT_COSINE_CHUNKS"),
        ("QAT_ENABLED", "set LATE_QAT=1"),
        ("SWA_ENABLED", "set EXPORT_WEIGHTS"),
        ("MLP_HIDDEN", "set MLP_MULT"),
        ("DATA_PATH", "set DATA_DIR, DATASET"),
    ],
)
def test_knob_that_would_mean_something_else_is_refused_with_the_reason(name, reason):
    (line,) = refusals(**{name: "1"})
    assert reason in line


@pytest.mark.parametrize(
    ("wrong", "meant"), [("TTT_TEMP_RESCAL", "TTT_TEMP_RESCALE"), ("QAT_ENABLE", "QAT_ENABLED")]
)
def test_misspelt_name_of_a_refused_knob_gets_the_reason(wrong, meant):
    (line,) = refusals(**{wrong: "1"})
    assert line == f"{wrong}=1: not a knob of this program; {tg.REJECTED_NAMES[meant]}"


def test_several_passes_over_a_document_are_refused_with_the_ruling():
    (line,) = refusals(PRESET="pr605", TTT_EPOCHS="6")
    assert (
        line.startswith("TTT_EPOCHS=6: must be 1 with TTT_MODE=document")
        and "ruling on PR #605" in line
    )


@pytest.mark.parametrize(
    ("theirs", "text", "field"),
    [
        ("VAL_BATCH_SIZE", "32768", "val_batch_tokens"),
        ("TTT_MAX_EVAL_SECS", "350", "eval_deadline_seconds"),
        ("GLOBAL_TTT_LR", "0.001", "ttt_lr"),
        ("GLOBAL_TTT_CHUNK_TOKENS", "8192", "ttt_chunk_tokens"),
    ],
)
def test_other_spelling_of_a_knob_is_that_knob(theirs, text, field):
    cfg, origin = tg.Config.from_env({"PRESET": "pr473", theirs: text}, has_cuda=False)
    assert (getattr(cfg, field), origin[field]) == (float(text), "env")
    same = tg.Config.from_env(
        {"PRESET": "pr473", theirs: text, field.upper(): text}, has_cuda=False
    )
    assert same == (cfg, origin)
    (line,) = refusals(PRESET="pr473", **{theirs: text, field.upper(): "16384"})
    assert line == f"{theirs}={text}: the same knob as {field.upper()}=16384"


def test_two_lengths_of_the_warm_down_are_refused():
    for setting in ({"PRESET": "pr473"}, {"WARMDOWN_ITERS": "3500"}):
        (line,) = refusals(WARMDOWN_FRAC="0.5", **setting)
        assert line == "WARMDOWN_FRAC=0.5: not with WARMDOWN_ITERS=3500"
    assert tg.Config.from_env(
        {"PRESET": "pr473", "WARMDOWN_FRAC": "0.5", "WARMDOWN_ITERS": "0"}, has_cuda=False
    )


# --- Warnings ---

WARNINGS = [
    # (preset, changed fields, beginning of the warning, its source)
    ("pr473", dict(ttt_chunk_optimizer="adam"), "TTT_CHUNK_OPTIMIZER=adam", "#473"),
    (
        "record",
        dict(ttt_chunk_optimizer="adam", phased_ttt_num_phases=1),
        "TTT_CHUNK_OPTIMIZER=adam",
        "#1947",
    ),
    ("pr1413", dict(ttt_epochs=10), "TTT_EPOCHS=10", "#526"),
    ("pr473", dict(ttt_freeze_blocks=2), "TTT_FREEZE_BLOCKS=2", "#549"),
    ("pr473", dict(late_qat=True), "LATE_QAT=1", "#398"),
    ("pr473", dict(quantizer="gptq"), "QUANTIZER=gptq", "#533"),
    ("pr605", dict(swa_threshold=0.5), "SWA_THRESHOLD=0.5", "#374"),
    ("record", dict(warmup_steps=0), "WARMUP_STEPS=0", "#1530"),
    ("pr605", dict(logit_temperature=0.98), "LOGIT_TEMPERATURE=0.98", "#605"),
]


@pytest.mark.parametrize(("name", "changed", "start", "source"), WARNINGS)
def test_setting_that_others_regretted_is_warned_of_with_its_source(name, changed, start, source):
    (text,) = dataclasses.replace(preset(name), **changed).warnings()
    assert text.startswith(start)
    assert source in text


@pytest.mark.parametrize("name", tg.PRESETS)
def test_no_preset_repeats_what_others_regretted(name):
    assert list(preset(name).warnings()) == []


def test_where_nothing_adapts_its_knobs_are_not_warned_of():
    changed = dict(ttt_enabled=False, ttt_chunk_optimizer="adam", ttt_epochs=10)
    assert list(dataclasses.replace(preset("pr473"), **changed).warnings()) == []


# --- Rules between knobs ---

RULES = [
    # (changed fields over the tiny config, the variable to blame)
    (dict(run_id="../elsewhere"), "RUN_ID"),
    (dict(run_id=".."), "RUN_ID"),
    (dict(model_dim=30, rope_dims=0), "MODEL_DIM"),
    (dict(model_dim=64, num_heads=4, num_kv_heads=3), "NUM_KV_HEADS"),
    (dict(rope_dims=3), "ROPE_DIMS"),
    (dict(rope_dims=18), "ROPE_DIMS"),
    (dict(mlp_mult=0.02), "MLP_MULT"),
    (dict(xsa_last_n=5), "XSA_LAST_N"),
    (dict(logit_softcap=80.5), "LOGIT_SOFTCAP"),
    (dict(loop_start=2, loop_end=1), "LOOP_START"),
    (dict(loop_end=4, parallel_start_layer=0), "LOOP_END"),
    (dict(num_layers=16, num_loops=64, parallel_start_layer=0), "NUM_LOOPS"),
    (dict(model_dim=8192, num_heads=64), "MODEL_DIM"),
    (dict(loop_end=3), "PARALLEL_START_LAYER"),
    (dict(parallel_start_layer=4), "PARALLEL_START_LAYER"),
    (dict(parallel_start_layer=1, num_loops=0), "PARALLEL_START_LAYER"),
    (dict(checkpoint_every=1.0), "CHECKPOINT_EVERY"),
    (dict(checkpoint_every=1.0, run_id="again", eval_only_path="x.pt"), "CHECKPOINT_EVERY"),
    (dict(train_batch_tokens=500), "TRAIN_BATCH_TOKENS"),
    (dict(train_seq_len=129), "TRAIN_SEQ_LEN"),
    (dict(cu_seqlens_capacity=5), "CU_SEQLENS_CAPACITY"),
    (dict(cu_seqlens_capacity=9, seq_len_schedule="0:32,0.5:64"), "CU_SEQLENS_CAPACITY"),
    (dict(seq_len_schedule="0.1:64"), "SEQ_LEN_SCHEDULE"),
    (dict(seq_len_schedule="0:32;0.5:64"), "SEQ_LEN_SCHEDULE"),
    (dict(seq_len_schedule="0:32,0.5:65"), "SEQ_LEN_SCHEDULE"),
    (dict(seq_len_schedule="0:1,0.5:64"), "SEQ_LEN_SCHEDULE"),
    (dict(seq_len_schedule="0:16,0.5:32,0.5:64"), "SEQ_LEN_SCHEDULE"),
    (dict(seq_len_schedule="0:32,1.5:64"), "SEQ_LEN_SCHEDULE"),
    (dict(seq_len_schedule="0:32,0.5:64", data_loader="shuffled"), "SEQ_LEN_SCHEDULE"),
    (dict(sparse_attn_gate_enabled=True, gate_window=33), "GATE_WINDOW"),
    (dict(smear_gate_enabled=True, smear_enabled=True), "SMEAR_GATE_ENABLED"),
    (dict(val_batch_tokens=511), "VAL_BATCH_TOKENS"),
    (dict(eval_stride=65), "EVAL_STRIDE"),
    (dict(tilt_hedge="1,,2"), "TILT_HEDGE"),
    (dict(ttt_chunk_size=65), "TTT_CHUNK_SIZE"),
    (dict(muon_coeffs="polar", muon_backend_steps=6), "MUON_BACKEND_STEPS"),
    (dict(recompile_limit=0, warmup_steps=0), "RECOMPILE_LIMIT"),
    (dict(ttt_short_chunks="8"), "TTT_SHORT_CHUNKS"),
    (dict(ttt_short_chunks="8:0"), "TTT_SHORT_CHUNKS"),
    (dict(ttt_short_chunks="8:4;9:5"), "TTT_SHORT_CHUNKS"),
    (dict(ttt_short_chunks="8:4,16:65"), "TTT_SHORT_CHUNKS"),
    (dict(ttt_mode="chunk", phased_ttt_num_phases=1), "TTT_MODE"),
    (dict(ttt_epochs=2), "TTT_EPOCHS"),
    (dict(ttt_chunk_tokens=63), "TTT_CHUNK_TOKENS"),
    (dict(ttt_freeze_blocks=5), "TTT_FREEZE_BLOCKS"),
    (dict(max_wallclock_seconds=20.0, gptq_reserve_seconds=10.5), "GPTQ_RESERVE_SECONDS"),
    (dict(branch_scale=True), "BRANCH_SCALE"),
    (dict(bigram_vocab_size=1), "BIGRAM_VOCAB_SIZE"),
    (dict(ve_enabled=True, ve_layers="3,4"), "VE_LAYERS"),
    (dict(ve_enabled=True, ve_layers="x"), "VE_LAYERS"),
    (dict(ve_enabled=True, ve_layers="1;2"), "VE_LAYERS"),
    (dict(ve_enabled=True, ve_layers="2,2"), "VE_LAYERS"),
    (dict(rope_train_seq_len=32, rope_dims=2), "ROPE_TRAIN_SEQ_LEN"),
    (dict(data_loader="shuffled", train_seq_len=60), "TRAIN_SEQ_LEN"),
    (dict(ttt_lr_factors="q"), "TTT_LR_FACTORS"),
    (dict(ttt_lr_factors="w:1"), "TTT_LR_FACTORS"),
    (dict(ttt_lr_factors="q:0.5;v:2"), "TTT_LR_FACTORS"),
    (dict(ttt_lr_factors="q:-1"), "TTT_LR_FACTORS"),
    (dict(ttt_min_doc_len=64, ttt_max_doc_len=64), "TTT_MAX_DOC_LEN"),
    (dict(artifact_limit_bytes=1000), "ARTIFACT_LIMIT_BYTES"),
]


@pytest.mark.parametrize(("changed", "name"), RULES)
def test_combination_that_cannot_work_is_refused_by_name_and_value(changed, name):
    with pytest.raises(tg.UsageError) as caught:
        tiny_config(**changed)
    value = changed.get(name.lower(), TINY.get(name))
    if isinstance(value, bool):
        value = int(value)
    starts = [line.split(": must be ")[0] for line in str(caught.value).splitlines()]
    assert f"{name}={value}" in starts


def test_every_rule_has_a_case():
    """Every `yield Rule` of a group is reached by a case of RULES; none by the tiny config."""
    groups = [n for n in TREE.body if isinstance(n, ast.ClassDef) and n.name.endswith("Knobs")]
    rules = {
        node.lineno for group in groups for node in ast.walk(group) if isinstance(node, ast.Yield)
    }
    fine = tiny_config()
    assert list(fine.rules()) == []
    reached = set()
    for changed, _ in RULES:
        for line in lines_that_yield(dataclasses.replace(fine, **changed)):
            reached.add(line)
    assert len(groups) == len(tg.GROUPS)
    assert reached == rules


def lines_that_yield(cfg):
    """The line of the file that yields each broken rule."""
    for group in tg.GROUPS:
        rules = group.rules(cfg)
        for _ in rules:
            innermost = rules
            while innermost.gi_yieldfrom is not None:
                innermost = innermost.gi_yieldfrom
            yield innermost.gi_frame.f_lineno


def test_a_group_has_the_rules_of_its_own_knobs():
    fine = tiny_config()
    for changed, _ in RULES:
        cfg = dataclasses.replace(fine, **changed)
        for group in tg.GROUPS:
            blamed = {rule.field for rule in group.rules(cfg)}
            assert blamed <= {f.name for f in dataclasses.fields(group)}


def test_values_of_the_other_variables_are_named_too():
    with pytest.raises(tg.UsageError, match=r"^EVAL_STRIDE=65: must be at most EVAL_SEQ_LEN=64$"):
        tiny_config(eval_stride=65)


def test_rules_wait_until_every_value_is_in_range():
    assert refusals(NUM_HEADS="0", EVAL_STRIDE="4096") == ["NUM_HEADS=0: must be at least 1"]


# --- Paths and packages ---

PATHS = [
    # (changed fields, what is made beforehand, the variable to blame)
    (dict(run_id="name"), "a folder logs/name.txt", "RUN_ID"),
    (dict(run_id="x" * 300), "", "RUN_ID"),
    (dict(run_id="é" * 200), "", "RUN_ID"),
    (dict(artifact_dir="file"), "a file file", "ARTIFACT_DIR"),
    (dict(artifact_dir="file/deeper"), "a file file", "ARTIFACT_DIR"),
    (dict(tensorboard_dir="file/points"), "a file file", "TENSORBOARD_DIR"),
    (dict(tensorboard_dir="points"), "no tensorboard", "TENSORBOARD_DIR"),
    (dict(compressor="zstd"), "no zstandard", "COMPRESSOR"),
    (dict(compressor="brotli"), "no brotli", "COMPRESSOR"),
]


@pytest.mark.parametrize(("changed", "made", "name"), PATHS)
def test_what_cannot_be_written_or_imported_is_refused(changed, made, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    article, _, rest = made.partition(" ")
    if article == "no":
        monkeypatch.setitem(sys.modules, rest, None)  # as good as not installed
    else:
        present = importlib.machinery.ModuleSpec("tensorboard", None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda package: present)
    kind, _, path = rest.partition(" ")
    if kind == "file":
        (tmp_path / path).touch()
    if kind == "folder":
        (tmp_path / path).mkdir(parents=True)
    cfg = tiny_config(**{"compressor": "lzma", **changed})
    with pytest.raises(tg.UsageError) as caught:
        tg.check_paths(cfg)
    starts = [line.split(": must be ")[0] for line in str(caught.value).splitlines()]
    assert f"{name}={changed[name.lower()]}" in starts


def test_paths_that_do_not_exist_yet_are_fine_and_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tg.check_paths(tiny_config(run_id="a", artifact_dir="b/c", compressor="lzma"))
    assert list(tmp_path.iterdir()) == []


# --- The table of knobs ---


def test_every_knob_has_a_meaning_of_its_own():
    """A phrase that can be read alone, unlike any other and short enough for a table."""
    meanings = [f.metadata["doc"] for f in FIELDS]
    assert len(set(meanings)) == len(meanings)
    assert [doc for doc in meanings if not 12 <= len(doc) <= 90] == []
    pointing = re.compile(r"^(its|the same|these|that|nor|or|of|and)\b")
    assert [doc for doc in meanings if pointing.match(doc)] == []


def test_every_knob_is_in_one_group():
    grouped = [f.name for group in tg.GROUPS for f in dataclasses.fields(group)]
    assert grouped == [f.name for f in FIELDS]


def test_knobs_option_prints_every_knob_with_its_default_per_preset(tmp_path):
    command = [sys.executable, str(ROOT / "train_gpt.py"), "--knobs"]
    env = {**os.environ, "SEED": "not a number"}
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    blocks = re.split(r"\n(?=[A-Z])", done.stdout.rstrip("\n"))
    for block, f in zip(blocks, FIELDS, strict=True):
        words = " ".join(block.split())
        usual, *others = words[: words.index(f.metadata["doc"])].split()
        cells = dict.fromkeys(tg.PRESETS, usual.removeprefix(f"{f.name.upper()}="))
        cells |= dict(cell.split("=") for cell in others)
        for name, cell in cells.items():
            value = getattr(preset(name), f.name)
            if type(f.default) is str:
                assert cell == (value or "-"), block
            else:
                assert float(cell) == value, block


def test_knobs_with_a_word_prints_those_that_have_it(capsys):
    assert tg.main(["--knobs", "tilt"]) == 0
    names = re.findall(r"^([A-Z_\d]+)=", capsys.readouterr().out, re.M)
    assert names == [f.name.upper() for f in FIELDS if f.name.startswith("tilt")]
    assert tg.main(["--knobs", "zebra"]) == 2
    assert capsys.readouterr().err.startswith("train_gpt.py: --knobs zebra: no knob has this word")


def test_help_prints_how_to_run_it_and_ends_with_0(capsys):
    for option in ("--help", "-h"):
        assert tg.main([option]) == 0
        text = capsys.readouterr().out
        assert "How to run it:" in text and "torchrun" in text and len(text.splitlines()) > 50


def test_missing_package_ends_in_one_line_with_the_remedy(tmp_path):
    script = str(ROOT / "train_gpt.py")
    code = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_path({script!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("train_gpt.py: ") and "make install" in done.stderr


def test_knobs_into_a_pipe_that_closes_end_in_silence(tmp_path):
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train_gpt.py"), "--knobs"],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as shown:
        shown.stdout.close()  # as `| head` does, here before the first line
        assert (shown.stderr.read(), shown.wait()) == ("", -signal.SIGPIPE)


# --- What the file promises of itself ---

IMPORT_CHECK = """
import sys
sys.path.insert(0, {root!r})
BLOCKED = {{"triton", "flash_attn", "flash_attn_interface", "sentencepiece", "zstandard", "brotli"}}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocker())
import os, torch, torch.distributed, numpy
class Spy(dict):
    def seen(self, *args):
        frame = sys._getframe(1)
        while frame.f_globals["__name__"] in ("os", "collections.abc", "__main__"):
            frame = frame.f_back
        assert frame.f_globals["__name__"] != "train_gpt", "reads the environment"
        return None
    def __getitem__(self, key): self.seen(); return super().__getitem__(key)
    def get(self, key, default=None): self.seen(); return super().get(key, default)
    def __contains__(self, key): self.seen(); return super().__contains__(key)
    def __iter__(self): self.seen(); return super().__iter__()
    def keys(self): self.seen(); return super().keys()
    def items(self): self.seen(); return super().items()
    def copy(self): self.seen(); return super().copy()
os.environ = Spy(os.environ)
import train_gpt
assert train_gpt.triton is None
assert not BLOCKED & set(sys.modules), BLOCKED & set(sys.modules)
assert not torch.distributed.is_initialized() and not torch.cuda.is_initialized()
print("imported")
"""


def test_import_reads_no_environment_and_needs_no_optional_package():
    bad = {f.name.upper(): "nonsense" for f in FIELDS}
    bad |= {"RANK": "x", "WORLD_SIZE": "y", "MATRX_LR": "1"}
    command = [sys.executable, "-c", IMPORT_CHECK.format(root=str(ROOT))]
    env = {**os.environ, **bad}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("imported\n"), done.stderr[-2000:]


def test_only_main_reads_the_environment():
    def reads(node):
        return {
            n.lineno
            for n in ast.walk(node)
            if isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv")
        }

    # `leave` ends the program while PyTorch is imported, before there is a config.
    readers = [reads(f) for f in FUNCTIONS if f.name in ("main", "leave")]
    assert len(readers) == 2 and all(readers)
    assert reads(TREE) == set.union(*readers)


def test_every_knob_is_used():
    """As `cfg.name` outside the checks, or as `self.name` in a property of its group."""
    checks = ("from_env", "rules_of_paths")
    used = set()
    for function in FUNCTIONS:
        decorators = {getattr(d, "id", "") for d in function.decorator_list}
        is_property = bool(decorators & {"property", "cached_property"})
        for node in ast.walk(function):
            if not isinstance(node, ast.Attribute) or function.name in checks:
                continue
            owner = getattr(node.value, "id", getattr(node.value, "attr", ""))
            if owner in ("cfg", "c") or (owner == "self" and is_property):
                used.add(node.attr)
    assert [f.name for f in FIELDS if f.name not in used] == []


def test_no_function_is_longer_than_80_lines():
    assert [(f.name, f.lineno) for f in FUNCTIONS if f.end_lineno - f.lineno >= 80] == []
