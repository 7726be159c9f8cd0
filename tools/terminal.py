"""How a program of tools/ ends: no traceback for Ctrl-C, a closed pipe or a plain terminal."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, which begins with its `prog`."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with exit status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def run(main: Callable[[list[str]], int]) -> int:
    """Calls `main` with the command line and returns its exit status.

    Signs that the output's encoding lacks become question marks. Where the reader of the output has
    gone, as after `| head`, the program ends quietly with status 0: it was not asked for more.
    Ctrl-C ends it in one line, with the status that a shell gives it.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more at its end; nobody may hear of that either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: stopped before its end", file=sys.stderr)
        return 128 + signal.SIGINT
    return status


def console(width: int = 200) -> Any:
    """A rich console, `width` wide where the output is no terminal. Needs the package rich."""
    from rich.console import Console

    class OrdinaryConsole(Console):
        """A console that leaves a closed pipe to `run`; rich would end with status 1."""

        def on_broken_pipe(self) -> None:
            """Raises what every other write to a closed pipe raises."""
            raise BrokenPipeError

    return OrdinaryConsole(width=None if sys.stdout.isatty() else width)
