"""Gives the local variables of a Python text short names, for the packed form of train_gpt.py.

Only names that nothing outside their function can refer to are changed: variables that a function
assigns, and that are no parameter, import, nested function or class, global or name in an f-string
(before Python 3.12 a syntax tree does not say where in the text such a name stands). The result
depends on the text alone. `differs` proves that a shortened text is the same program.
"""

from __future__ import annotations

import ast
import itertools
import keyword
import string
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

Function = ast.FunctionDef
Place = tuple[int, int]  # line from 1, column in UTF-8 bytes


class Edit(NamedTuple):
    """A name and what it becomes."""

    old: str
    new: str


def short_names() -> Iterator[str]:
    """a, b, .., Z, aa, ab, .. without keywords."""
    letters = string.ascii_letters
    for first in ["", *letters]:
        for last in letters:
            if not keyword.iskeyword(first + last):
                yield first + last


def outer_functions(body: list[ast.stmt]) -> Iterator[Function]:
    """Functions and methods that stand in no other function."""
    for node in body:
        if isinstance(node, Function):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from outer_functions(node.body)


def names_used(function: Function) -> Counter[str]:
    """How often each plain name occurs in a function."""
    return Counter(node.id for node in ast.walk(function) if isinstance(node, ast.Name))


def fixed_names(function: Function) -> set[str]:
    """Names in a function that must stay: another part of the program may refer to them."""
    fixed = set()
    for node in ast.walk(function):
        if isinstance(node, ast.arg):
            fixed.add(node.arg)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            fixed.update(node.names)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            fixed.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ExceptHandler) and node.name or isinstance(node, Function):
            fixed.add(node.name)
        elif isinstance(node, (ast.ClassDef, ast.JoinedStr, ast.MatchAs, ast.MatchStar)):
            fixed.add(getattr(node, "name", None))
            fixed.update(part.id for part in ast.walk(node) if isinstance(part, ast.Name))
    return fixed


def new_names(function: Function) -> dict[str, str]:
    """Old name -> short name of a function's variables, the most frequent ones first."""
    used = names_used(function)
    fixed = fixed_names(function)
    assigned = assigned_names(function)
    renamed = [name for name, _ in used.most_common() if name in assigned - fixed]
    free = (name for name in short_names() if name not in used and name not in fixed)
    return dict(zip(renamed, free, strict=False))


def edits(tree: ast.Module) -> dict[Place, Edit]:
    """The changes of a text by where they stand."""
    changes = {}
    for function in outer_functions(tree.body):
        names = new_names(function)
        for node in name_nodes(function):
            if node.id in names:
                changes[node.lineno, node.col_offset] = Edit(node.id, names[node.id])
    return changes


def shorten(text: str) -> str:
    """The same program with short names of local variables."""
    lines = text.encode().splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]
    data = text.encode()
    pieces = []
    end = 0
    for (line, column), edit in sorted(edits(ast.parse(text)).items()):
        start = starts[line - 1] + column
        pieces += [data[end:start], edit.new.encode()]
        end = start + len(edit.old.encode())
    return b"".join([*pieces, data[end:]]).decode()


def differs(text: str, shortened: str) -> str:
    """Why `shortened` is not the program of `text`, or "" if it is.

    Both trees must be equal but for the names of local variables, and in each function one name
    must stand for one name, both ways. Names that are not local must stand for themselves.
    """
    before = ast.parse(text)
    after = ast.parse(shortened)
    functions = zip(outer_functions(before.body), outer_functions(after.body), strict=False)
    for old, new in functions:
        reason, old_names = compare_names(old, new)
        if reason:
            return f"{old.name}: {reason}"
        for node in name_nodes(new):
            node.id = old_names.get(node.id, node.id)
    return "" if ast.dump(before) == ast.dump(after) else "the trees differ"


def compare_names(old: Function, new: Function) -> tuple[str, dict[str, str]]:
    """Why the names of two functions do not stand for each other, and new name -> old name."""
    new_names: dict[str, str] = {}
    old_names: dict[str, str] = {}
    local = assigned_names(old) - fixed_names(old)
    for a, b in zip(name_nodes(old), name_nodes(new), strict=False):
        if new_names.setdefault(a.id, b.id) != b.id or old_names.setdefault(b.id, a.id) != a.id:
            return f"{a.id} and {b.id} do not stand for each other", old_names
        if a.id != b.id and a.id not in local:
            return f"{a.id} is not local", old_names
    # A short name must not take the place of a parameter, import or nested function.
    taken = fixed_names(old) & old_names.keys()
    captured = [name for name in taken if old_names[name] != name]
    return f"{captured[0]} means something else" if captured else "", old_names


def name_nodes(function: Function) -> list[ast.Name]:
    """The plain names of a function in the order of the tree."""
    return [node for node in ast.walk(function) if isinstance(node, ast.Name)]


def assigned_names(function: Function) -> set[str]:
    """The names that a function assigns to."""
    return {node.id for node in name_nodes(function) if isinstance(node.ctx, ast.Store)}
