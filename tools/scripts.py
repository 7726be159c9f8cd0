"""Loads a train_gpt.py, whichever file that is, as a module of its own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from digests import file_sha256


def load_script(path: Path) -> ModuleType:
    """The script as a module; loaded once for equal text.

    Its operators get names of their own, because a second copy of an operator would destroy the
    first.
    """
    # The script needs torch; programs that load none should not wait for it.
    import torch

    digest = file_sha256(path)[:12]
    name = f"script_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    custom_op = torch.library.custom_op

    def renamed_custom_op(operator: str, *args: object, **options: object) -> object:
        return custom_op(operator.replace("::", f"_{digest}::"), *args, **options)

    torch.library.custom_op = renamed_custom_op
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]  # a module that is half loaded must not be found again
        raise
    finally:
        torch.library.custom_op = custom_op
    return module
