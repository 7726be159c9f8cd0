"""The replay of a claim: honest claims agree, false ones do not, whatever they were edited into."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import replay_cheats
from conftest import ROOT, TINY, run_script

sys.path.insert(0, str(ROOT / "tools"))
import audit
import code_changes
import commitment
import fresh_process
import legality
import replay
import runlog
import training_replay
import verdict_page
from digests import sha256
from held import HeldData
from packed_code import pack_code

SCRIPT = ROOT / "train_gpt.py"
ENTROPY = "1f"
DOCUMENTS = "5"


@pytest.fixture(scope="module")
def data_dir(tiny_data: Path) -> Iterator[None]:
    """DATA_DIR for the commands, which run here."""
    os.environ["DATA_DIR"] = str(tiny_data)
    yield
    del os.environ["DATA_DIR"]


@pytest.fixture(scope="module")
def honest(tiny_data: Path, data_dir: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run: logs/a.txt, runs/a/final_model.int6.ptz."""
    folder = tmp_path_factory.mktemp("claims")
    done = run_script({**TINY, "DATA_DIR": str(tiny_data), "RUN_ID": "a"}, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def scored(honest: Path) -> Iterator[dict]:
    """What the two evaluations of the honest claim give, each made once."""
    claim = read(honest)
    draw = replay.draw_documents(claim.held, int(DOCUMENTS), int(ENTROPY, 16), True)
    numbers = np.append(draw.drawn, sorted(draw.decoys)[: replay.PLAIN_DECOYS])
    yield {
        "submitted": replay.score_alone(claim, SCRIPT, draw.tokens),
        "plain": replay.score_plainly(claim, draw.tokens, numbers),
    }


@pytest.fixture
def cached(scored: dict, monkeypatch: pytest.MonkeyPatch) -> dict:
    """The evaluations do not run again; a test may change what they give.

    They took no time: a machine that is busy now and was not before must fail no other test.
    """
    copy = {name: one._replace(nats=one.nats.copy(), timed=0.0) for name, one in scored.items()}
    monkeypatch.setattr(replay, "score_alone", lambda *_, **changes: copy[changes_name(changes)])
    monkeypatch.setattr(replay, "score_plainly", lambda *_: copy["plain"])
    return copy


def changes_name(changes: dict[str, str]) -> str:
    return "fp32" if changes else "submitted"


def read(folder: Path) -> replay.Claim:
    """The claim of a folder."""
    artifact = folder / "runs" / "a" / "final_model.int6.ptz"
    return replay.read_claim(folder / "logs" / "a.txt", artifact, os.environ)


def command(folder: Path, *options: str) -> int:
    """The exit status of the command for the claim of a folder."""
    log, artifact = folder / "logs" / "a.txt", folder / "runs" / "a" / "final_model.int6.ptz"
    drawn = ["--documents", DOCUMENTS, "--entropy", ENTROPY]
    return audit.main(["replay", str(log), str(artifact), *drawn, *options])


def test_an_honest_claim_agrees_with_every_evaluation(honest, scored, cached, tmp_path, capsys):
    assert command(honest, "--page", str(tmp_path / "page")) == 0
    said = capsys.readouterr().out
    assert "claim     submitted agree" in said and "submitted plain     agree" in said
    assert "5 documents and 4 decoys" in said and "entropy 0000" in said
    claimed = read(honest).documents
    apart = abs(scored["submitted"].nats - claimed["doc_nats"] / claimed["doc_tokens"])
    draw = replay.draw_documents(read(honest).held, int(DOCUMENTS), int(ENTROPY, 16), True)
    assert apart[draw.drawn].max() < 1e-6  # the same places and batches
    # Other text, though a copy may happen to be cut at its end.
    assert (apart[list(draw.decoys)] > 1e-3).sum() > len(draw.decoys) / 2
    kept = json.loads((honest / "runs" / "a" / "replay.json").read_text())
    assert kept["passed"] and kept["facts"]["drawn"] == 5 and kept["facts"]["decoys"] == 7
    for ending in ("md", "html"):
        page = (tmp_path / f"page.{ending}").read_text()
        assert "The replayed score agrees; 8 of 9 conditions were not tested" in page
        assert page.count("no audit.json of this artifact") == 8 and "Not tested" in page
        assert page.count("To test it: python tools/audit.py ") == 8
        assert "the released file" in page
        assert "viewport" in page or ending == "md"


def test_the_plain_evaluator_follows_windows_that_cross_documents_and_slide(tiny_data, tmp_path):
    """Without adaptation, rows are windows of the stream; an honest claim of them was accused."""
    rows = {"DATA_LOADER": "rows", "TTT_ENABLED": "0", "SLIDING_WINDOW_ENABLED": "1"}
    settings = {**TINY, **rows, "EVAL_STRIDE": "24", "DATA_DIR": str(tiny_data), "RUN_ID": "a"}
    done = run_script(settings, tmp_path)
    assert done.returncode == 0, done.stderr
    claim = replay.read_claim(
        tmp_path / "logs/a.txt",
        tmp_path / "runs/a/final_model.int6.ptz",
        {"DATA_DIR": str(tiny_data)},
    )
    assert claim.goes_along_stream and claim.stride == 24
    found = replay.score_plainly(claim, claim.held.tokens, np.arange(3)).nats
    claimed = claim.documents["doc_nats"] / claim.documents["doc_tokens"]
    assert abs(found - claimed).max() < 1e-5


def test_a_log_that_was_edited_consistently_is_found(honest, cached, tmp_path, capsys):
    shutil.copytree(honest, tmp_path / "copy")
    run = tmp_path / "copy"
    replay_cheats.edit_consistently(run / "logs" / "a.txt", run / "runs" / "a" / "documents.npz")
    assert replay.faults_of_commitment(read(run), SCRIPT) == []  # nothing but a replay can tell
    assert command(run) == 1
    said = capsys.readouterr().out
    assert "VIOLATION: claim and submitted disagree on 5 documents" in said


def test_a_gain_on_every_document_below_the_rounding_of_one_is_found_by_its_mean():
    rng = np.random.default_rng(0)
    differences = 2e-3 * rng.standard_normal(400)
    differences[7] = 0.012  # one document that learning takes elsewhere
    draw = replay.Draw(0, np.arange(100), 0, np.zeros(0, np.uint16), {})
    allowed = replay.allowed_rounding(differences, len(draw.drawn))
    assert allowed.document == pytest.approx(0.024)
    honest = rng.choice(differences, 400)
    scores = rng.uniform(2, 4, 400)
    for gain, agrees in ((0.0, True), (0.01, False)):
        pair = (scores - gain, scores + honest)
        one = replay.compare(("claim", "plain"), pair, draw, allowed, with_decoys=False)
        assert not one.disagreeing
        assert one.agrees == agrees


@pytest.mark.parametrize(
    "pattern,replacement,words",
    [
        (r'"artifact_bytes": \d', '"artifact_bytes": 9', "artifact_bytes is 9"),
        (r"^NUM_BANDS = 64", "NUM_BANDS = 63", "the source text in the log"),
        (r"^(all of eval +)\d", r"\g<1>900", "all of eval: 900"),
        (r"^  qk_gain_init: \S+ \(default\)", "  qk_gain_init: 7.0 (default)", "qk_gain_init is 7"),
        (r'"val_bytes": (\d)', r'"val_bytes": 1\1', "val_bytes is 1"),
    ],
)
def test_an_edit_that_the_log_shows_ends_the_command_before_anything_is_scored(
    honest, tmp_path, capsys, monkeypatch, pattern, replacement, words
):
    monkeypatch.setattr(replay, "evaluate", None)
    shutil.copytree(honest, tmp_path / "copy")
    log = tmp_path / "copy" / "logs" / "a.txt"
    text, number = re.subn(pattern, replacement, log.read_text(), flags=re.MULTILINE)
    assert number == 1
    log.write_text(text)
    assert command(tmp_path / "copy") == 1
    said = capsys.readouterr().out
    assert f"VIOLATION: {words}" in said and "nothing was scored" in said


def test_one_document_that_an_evaluation_scores_otherwise_is_found(honest, cached):
    claim = read(honest)
    draw = replay.draw_documents(claim.held, 5, int(ENTROPY, 16), True)
    for name, number in (("submitted", draw.drawn[1]), ("plain", draw.drawn[2])):
        for change in (-0.01, math.nan):
            before = cached[name].nats[number]
            cached[name].nats[number] += change
            verdict = replay.replay(claim, SCRIPT, SCRIPT, 5, int(ENTROPY, 16))
            assert not verdict.passed and f"({number})" in verdict.faults[0], verdict.faults
            cached[name].nats[number] = before
    decoy = sorted(draw.decoys)[0]
    cached["submitted"].nats[decoy] -= 0.01  # a cache that knows more than the drawn ones
    verdict = replay.replay(claim, SCRIPT, SCRIPT, 5, int(ENTROPY, 16))
    assert any(fault.startswith("submitted and plain disagree") for fault in verdict.faults)


def test_a_run_in_bf16_may_differ_from_fp32_as_the_trusted_script_does(honest, cached):
    """And no more: the distance is that of trusted code in both precisions."""
    claim = read(honest)
    settings = {**claim.settings, "compute_dtype": "bf16"}
    rounded = claim.documents["doc_nats"] + 1e-3 * claim.documents["doc_tokens"]
    documents = {**claim.documents, "doc_nats": rounded}
    found = commitment.totals(documents)
    final = {**claim.final, "val_loss": found.loss, "val_bpb": found.bpb}
    final["documents_sha256"] = commitment.root(documents)
    claim = claim._replace(settings=settings, documents=documents, final=final)
    cached["fp32"] = cached["submitted"]._replace(nats=cached["submitted"].nats.copy())
    for shift, agrees in ((1e-3, True), (0.4e-3, False)):
        cached["submitted"] = cached["fp32"]._replace(nats=cached["fp32"].nats + shift)
        verdict = replay.replay(claim, SCRIPT, SCRIPT, 5, int(ENTROPY, 16))
        pairs = {(one.first, one.second): one for one in verdict.comparisons}
        assert pairs["claim", "plain"].agrees is agrees, verdict.faults
        assert pairs["fp32", "plain"].agrees and pairs["fp32", "plain"].allowed < 2e-4


def test_files_that_do_not_belong_together_are_found_without_running(honest, tmp_path):
    claim = read(honest)
    assert replay.faults_of_commitment(claim, SCRIPT) == []
    other = tmp_path / "train_gpt.py"
    other.write_text(SCRIPT.read_text() + "\n")
    assert "code_sha256" in replay.faults_of_commitment(claim, other)[0]
    worse = claim._replace(final={**claim.final, "artifact_sha256": "0" * 64})
    assert "artifact_sha256" in replay.faults_of_commitment(worse, SCRIPT)[0]
    sample = claim._replace(settings={**claim.settings, "val_doc_fraction": "0.5"})
    (fault,) = replay.faults_of_commitment(sample, SCRIPT)
    assert fault.endswith("is no claim")
    verdict = replay.replay(sample, SCRIPT, SCRIPT, 5, int(ENTROPY, 16))
    assert not verdict.passed and not verdict.comparisons
    assert f"NO CLAIM: {fault}" in replay.as_text(verdict)
    assert "VIOLATION" not in replay.as_text(verdict)


def test_a_slow_clock_is_found_by_the_trusted_script(honest, cached):
    claim = read(honest)
    said = replay.evaluation_seconds(claim.final)

    def faults(trusted_s: float, claim: replay.Claim = claim) -> list[str]:
        return replay.faults_of_clock(claim, replay.Evaluations({}, timed={"reference": trusted_s}))

    assert faults(max(said, 1.1)) == []
    assert "trusted script takes" in faults(10 * said + 1)[0]
    elsewhere = claim._replace(final={**claim.final, "device": "another machine"})
    assert faults(10 * said + 1, elsewhere) == []


def test_a_clock_that_goes_slower_than_the_reviewers_is_found(honest, cached):
    claim = read(honest)

    def faults(own_s: float) -> list[str]:
        # Both take 40 s, of which the reference spends 10 s beside its evaluations.
        seconds = {"submitted": 40.0, "reference": 40.0}
        timed = {"submitted": own_s, "reference": 30.0}
        found = replay.Evaluations({}, seconds=seconds, timed=timed)
        return [fault for fault in replay.faults_of_clock(claim, found) if "outside" in fault]

    assert faults(30.0) == faults(25.0) == []
    assert faults(3.0) == [
        "the submitted script's clock says 3.0 s of evaluation, 30.0 s passed outside"
    ]


def test_nothing_but_the_text_tells_a_decoy_from_a_document(honest):
    held = read(honest).held
    draws = [replay.draw_documents(held, 5, entropy, True) for entropy in range(6)]
    kinds = set()
    for draw in draws:
        assert draw.longest in draw.drawn and len(draw.drawn) == 5
        assert np.array_equal(np.flatnonzero(draw.tokens == held.bos), held.starts)
        kinds |= set(draw.decoys.values())
        for number in range(len(held.counts)):
            ids = draw.tokens[held.text_span(number)]
            same = np.array_equal(ids, held.tokens[held.text_span(number)])
            assert same or number in draw.decoys
            # No piece of a character is alone, which check_bytes would see.
            assert "\ufffd" not in held.model.decode(ids.tolist())
    assert kinds == set(replay.DECOY_KINDS)
    assert len({tuple(draw.drawn) for draw in draws}) > 1
    kept = replay.draw_documents(held, 5, 0, False)
    assert np.array_equal(kept.tokens, held.tokens) and not kept.decoys


def test_agreeing_documents_bound_the_share_of_false_ones():
    assert round(100 * replay.excluded_share(200, 50_000), 1) == 1.5
    assert replay.excluded_share(12, 12) == 1 / 12  # one false document would have shown
    for drawn, total in ((5, 40), (20, 100)):
        false = round(replay.excluded_share(drawn, total) * total)
        missed = math.comb(total - false, drawn) / math.comb(total, drawn)
        missed_before = math.comb(total - false + 1, drawn) / math.comb(total, drawn)
        assert missed < 0.05 <= missed_before


def test_settings_by_which_documents_use_earlier_ones_leave_no_decoys(honest):
    claim = read(honest)
    assert not claim.crosses_documents
    for change in (
        {"ttt_warm_start_a": "True"},
        {"phased_ttt_num_phases": "1"},
        {"tilt_order": "4"},
        {"ttt_mode": "chunk"},
        {"ttt_enabled": "False", "data_loader": "rows"},
    ):
        assert claim._replace(settings={**claim.settings, **change}).crosses_documents, change


def test_a_memorised_document_stands_out_beside_an_independent_model(honest, tmp_path):
    claim = read(honest)
    rng = np.random.default_rng(0)
    documents = claim.documents
    noise = np.exp(rng.normal(0, 0.02, len(documents["doc_nats"])))
    other = tmp_path / "other.npz"
    np.savez(other, **{**documents, "doc_nats": documents["doc_nats"] * noise})
    assert "no document is" in replay.known_too_well(claim, other)[0]
    known = {**documents, "doc_nats": documents["doc_nats"].copy()}
    known["doc_nats"][3] *= 0.3
    note = replay.known_too_well(claim._replace(documents=known), other)[0]
    assert note.startswith("LOOK: 1 documents") and " 3 (0.3" in note
    assert "not looked for" in replay.known_too_well(claim, None)[0]


def test_changed_code_is_shown_by_section(tmp_path):
    assert code_changes.sentence(SCRIPT).endswith("the released file")
    changed = tmp_path / "train_gpt.py"
    text = SCRIPT.read_text()
    changed.write_text(text.replace("NUM_BANDS = 64", "NUM_BANDS = 63\n# more"))
    (change,) = code_changes.changes(changed)
    assert (change.number, change.added, change.removed) == (9, 2, 1)
    assert "self_contained" in code_changes.describe(change)
    assert "sections 9" in code_changes.sentence(changed)
    assert set(code_changes.sections(text)) == set(code_changes.RESTS_ON)


def test_a_packed_file_is_the_code_that_it_was_packed_from(honest, tmp_path):
    packed = tmp_path / "train_gpt.py"
    packed.write_bytes(pack_code(SCRIPT.read_bytes()))
    assert code_changes.sentence(packed).endswith(", packed, the released file")
    assert code_changes.changes(packed) == []
    assert replay.faults_of_commitment(read(honest), packed) == []
    # Its author may write any hash into it: only the program counts.
    other = tmp_path / "other.py"
    digest = runlog.read_final((honest / "logs" / "a.txt").read_text())["code_sha256"]
    forged = pack_code(b"x = 1\n").replace(sha256(b"x = 1\n").encode(), digest.encode())
    other.write_bytes(forged)
    assert "code_sha256" in replay.faults_of_commitment(read(honest), other)[0]
    assert len(code_changes.changes(other)) == len(code_changes.RESTS_ON)
    (tmp_path / "train_gpt_readable.py").write_bytes(b"x  =  1  # one\n")
    assert code_changes.readable_code(other) == b"x  =  1  # one\n"


def test_a_headline_says_how_much_was_tested():
    def row(mark: str) -> verdict_page.Row:
        return verdict_page.Row(f"is {mark}", mark, "", "")

    agreed = replay.Verdict({}, [], [], [])
    for marks, words in (
        (["yes", "yes"], "all conditions were tested"),
        (["yes", "not shown", "yes"], "agrees; 1 of 3 conditions were not tested"),
        (["yes", "no", "not shown"], "speaks against: is no"),
    ):
        assert verdict_page.headline(agreed, list(map(row, marks))).endswith(words)
    false = replay.Verdict({}, [], ["a fault"], [])
    assert verdict_page.headline(false, [row("no")]) == "The claim is false"


def test_a_page_names_the_judge_that_ran():
    for seconds, named in (({"plain": 1.0}, "plain evaluator"), ({}, "own train_gpt.py")):
        verdict = replay.Verdict({"seconds": seconds}, [], [], [])
        (first, *_) = verdict_page.sentences_of_limits(verdict)["For a cheat to pass"]
        assert named in first and "{" not in first


@pytest.mark.parametrize("odd", ["[]", "[" * 200_000, '{"properties": {"causal": 1}}', None])
def test_an_audit_that_is_none_shows_no_property(tmp_path, odd):
    artifact = tmp_path / "a.ptz"
    artifact.write_bytes(b"weights")
    if odd:
        (tmp_path / "audit.json").write_text(odd)
    assert verdict_page.audited_properties(artifact) == {}


def test_an_audit_counts_for_its_own_artifact_alone(tmp_path):
    artifact = tmp_path / "a.ptz"
    artifact.write_bytes(b"weights")
    for digest, counts in ((sha256(b"weights"), True), ("0" * 64, False)):
        audit_of_it = {"artifact_sha256": digest, "properties": {"causal": {"passed": True}}}
        (tmp_path / "audit.json").write_text(json.dumps(audit_of_it))
        assert bool(verdict_page.audited_properties(artifact)) is counts


def test_noise_keeps_documents_and_first_losses_are_read(honest):
    held = read(honest).held
    noise = training_replay.noise_of(held, 1)
    assert np.array_equal(np.flatnonzero(noise == held.bos), held.starts)
    assert (noise != held.tokens).mean() > 0.8
    losses = training_replay.first_losses((honest / "logs" / "a.txt").read_text())
    assert 1 in losses and set(losses) <= {1, 2}


def test_forged_files_of_the_table_are_refused(honest):
    data = (honest / "runs" / "a" / "final_model.int6.ptz").read_bytes()
    forged = list(replay_cheats.forged_files(data))
    assert len(forged) == 4
    for _, _, file in forged:
        assert "damaged" in replay_cheats.container.difference(file)


def test_every_false_claim_can_be_planted(tmp_path):
    for registry in (replay_cheats.CLAIMS, replay_cheats.TRAINING):
        for name, false in registry.items():
            text = replay_cheats.plant(false, tmp_path).read_text()
            compile(text, name, "exec")
            assert text.count(f"{name}(sys.modules[__name__])") == 1 and false.plant.__doc__


@pytest.mark.parametrize(
    "arguments,word",
    [
        (["{a}/none.txt", "{a}/none.ptz"], "no such file"),
        (["{log}", "{art}", "--documents", "1"], "at least 2"),
        (["{log}", "{art}", "--entropy", "xyz"], "hexadecimal"),
        (["{log}", "{art}", "--json", "/nope/x"], "cannot be written"),
    ],
)
def test_wrong_usage_is_one_line(honest, capsys, arguments, word):
    names = {"a": honest, "log": honest / "logs/a.txt"}
    names["art"] = honest / "runs/a/final_model.int6.ptz"
    with pytest.raises(SystemExit) as ended:
        audit.main(["replay", *[argument.format(**names) for argument in arguments]])
    said = capsys.readouterr()
    assert ended.value.code == 2 and word in said.err and said.err.count("\n") == 1


def test_a_log_without_a_result_is_wrong_usage(honest, tmp_path, capsys):
    log = tmp_path / "a.txt"
    log.write_text("step:1/2 train_loss:3.0\n")
    artifact = honest / "runs/a/final_model.int6.ptz"
    assert audit.main(["replay", str(log), str(artifact)]) == 2
    assert audit.main(["training", str(log)]) == 2
    assert capsys.readouterr().err.count("\n") == 2


@pytest.mark.parametrize("odd", ["empty", "no archive", "another", "beside"])
def test_documents_that_cannot_be_read_are_one_line_before_anything_runs(
    honest, tmp_path, capsys, monkeypatch, odd
):
    monkeypatch.setattr(replay, "evaluate", lambda *_: pytest.fail("something was scored"))
    run = Path(shutil.copytree(honest, tmp_path / "copy"))
    documents = run / "runs" / "a" / "documents.npz"
    options = []
    if odd == "beside":
        documents = tmp_path / "beside.npz"
        options = ["--beside", str(documents)]
    content = {"empty": b"", "no archive": b"PK\3\4 and so on"}
    documents.write_bytes(content.get(odd, b""))
    if odd in ("another", "beside"):
        np.savez(documents, doc_nats=np.ones(12), doc_bytes=np.ones(12, int))
    assert command(run, *options) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(documents.parent) in said


def test_a_log_without_settings_that_decide_a_score_is_wrong_usage(honest, tmp_path, capsys):
    run = Path(shutil.copytree(honest, tmp_path / "copy"))
    log = run / "logs" / "a.txt"
    log.write_text(re.sub(r"^ *ttt_lora_rank:.*\n", "", log.read_text(), flags=re.M))
    assert command(run) == 2
    assert "lacks the settings ttt_lora_rank" in capsys.readouterr().err


def test_a_process_that_leaves_no_scores_to_read_has_none(tmp_path):
    path = tmp_path / "documents.npz"
    assert fresh_process.scores_left_at(path) is None
    path.write_bytes(b"PK\3\4 and so on")
    assert fresh_process.scores_left_at(path) is None
    nothing_wrong = fresh_process.Judgement([], [])
    fresh = fresh_process.Outcome(0, "", [], "", None, nothing_wrong)
    trial = SimpleNamespace(
        fresh=fresh,
        subject=SimpleNamespace(names=["quantized"]),
        few_docs=SimpleNamespace(counts=np.ones(3)),
    )
    finding = legality.artifact_only(trial)
    assert finding.passed is False and "no scores" in finding.evidence


def test_data_that_the_audit_reads_by_itself_are_those_of_the_script(honest, tiny_data):
    held = read(honest).held
    documents = read(honest).documents
    assert np.array_equal(documents["doc_bytes"], [held.bytes_of(n) for n in range(12)])
    final = runlog.read_final((honest / "logs" / "a.txt").read_text())
    assert held.sha256 == final["val_sha256"]
    assert commitment.totals(documents).bytes == final["val_bytes"]
    assert isinstance(held, HeldData)
