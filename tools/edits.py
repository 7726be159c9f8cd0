"""What an edited log has against it: its own lines, the program at hand, the documents beside it.

`edits_of_run` names all of it, without scoring anything; report.py, audit.py and the replay share
it. What a log says against itself is in contradictions.py and comes with the run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import commitment
from digests import file_sha256
from packed_code import same_program
from run_documents import ARTIFACT, losses_in, run_folder
from runlog import Run

from train_gpt import (
    CODE_SHA256,
    FIELDS,
    NETWORK_FIELDS,
    PRESETS,
    TEXT,
    Config,
    UsageError,
    preset_values,
)


def edits_of_run(run: Run) -> list[str]:
    """What shows that a run's log was edited, a sentence each; [] if nothing does."""
    return [
        *run.contradictions,
        *other_program(run),
        *other_values(run),
        *other_documents(run),
        *other_artifact(run),
    ]


def is_of_this_program(run: Run) -> bool:
    """Whether the log says that the train_gpt.py at hand has run."""
    return run.final.get("code_sha256") == CODE_SHA256


def other_program(run: Run) -> Iterator[str]:
    """That a packed file's text in the log is another program than the source it names.

    Only the train_gpt.py at hand is there to compare with.
    """
    if not run.packed_source or not is_of_this_program(run):
        return
    if not is_this_program(run.packed_source):
        yield f"the source text in the log is not the program of its code_sha256, {CODE_SHA256[:8]}"


@functools.lru_cache(maxsize=8)
def is_this_program(text: str) -> bool:
    """Whether a text is the program of the train_gpt.py at hand, without its comments."""
    try:
        return same_program(TEXT.encode(), text)
    except (SyntaxError, ValueError, RecursionError):
        return False


def other_values(run: Run) -> Iterator[str]:
    """Settings that the log calls a default or the preset's, but that have another value there.

    Only where the train_gpt.py at hand has run: its presets are known. A run that took a model's
    file has that file's network, whatever its preset.
    """
    preset = run.config.get("preset", "")
    if not is_of_this_program(run) or preset not in PRESETS:
        return
    values = preset_values(preset, shrink=run.config.get("shrink") == "True")
    expected = Config(**values)
    loaded = NETWORK_FIELDS if run.config.get("eval_only_path") else ()
    for name, (value, origin) in run.settings.items():
        if origin not in ("default", "preset") or name not in FIELDS or name in loaded:
            continue
        wanted = str(getattr(expected, name))
        if value != wanted.strip():
            true_origin = "preset" if name in values else "default"
            yield (
                f"{name} is {value} ({origin}) in the log, "
                f"but {wanted} ({true_origin}) with PRESET={preset}"
            )


def other_artifact(run: Run) -> Iterator[str]:
    """That the artifact which the run left, and whose hash the log has, is of another size."""
    folder = run_folder(run)
    claimed = run.final.get("model_bytes")
    if folder is None or claimed is None:
        return
    path = folder / ARTIFACT
    try:
        size = path.stat().st_size
        # The size is looked at first: it costs nothing, and most logs are honest.
        if size == claimed or file_sha256(path) != run.final.get("artifact_sha256"):
            return
    except OSError:
        return
    yield f"model_bytes is {claimed} in the log, but {path}, which it names, has {size} bytes"


def other_documents(run: Run) -> Iterator[str]:
    """That the documents to which the final line commits add up to another score."""
    committed = run.final.get("documents_sha256")
    folder = run_folder(run) if committed else None
    for path in sorted(folder.glob("*.npz")) if folder else []:
        try:
            arrays = losses_in(path)
        except UsageError:
            # report.py says so where it reads the losses.
            continue
        if not arrays or commitment.unfit(arrays) or commitment.root(arrays) != committed:
            continue
        for problem in commitment.problems(run.final, {}, arrays):
            yield f"{problem} that it commits to ({path})"
