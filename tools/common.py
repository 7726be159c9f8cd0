"""What several of the programs here share."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

# Validation targets -> (name, bytes they decode to), as counted over the public logs; long windows drop a tail.
PUBLISHED = {
    62_021_632: ("sp1024", 151_080_363),
    45_508_608: ("sp4096", 151_074_053),
    40_540_160: ("sp8192", 151_078_222),
    47_851_520: ("sp8192 CaseOps", 151_074_499),
    151_130_112: ("byte260", 151_080_114),
    63_779_840: ("sp1024, first split", 155_769_746),
}


def log_of_run(folder: Path) -> Path:
    """The log of the run that left `folder`, which need not exist: logs/ID.txt beside runs/ID, and of a sweep's run,
    runs/sweeps/NAME/0000, logs/NAME-0000.txt beside runs/."""
    at = folder.absolute()
    if at.match("runs/sweeps/*/*"):
        return at.parents[3] / "logs" / f"{at.parent.name}-{at.name}.txt"
    return at.parent.parent / "logs" / f"{at.name}.txt"


def load_script(path: Path) -> ModuleType:
    """A train_gpt.py as a module of its own, its operators under own names: a second copy of an operator would destroy
    the first. Loaded once for equal text."""
    import torch  # the script needs it; the programs that load none do not wait for it

    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    if (name := f"script_{digest}") in sys.modules:
        return sys.modules[name]
    spec, register = importlib.util.spec_from_file_location(name, path), torch.library.custom_op
    torch.library.custom_op = lambda op, *args, **options: register(
        op.replace("::", f"_{digest}::"), *args, **options
    )
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # what is half loaded must not be found again
        raise
    finally:
        torch.library.custom_op = register
    return module
