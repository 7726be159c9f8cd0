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
from collections.abc import Iterator, Mapping

Function = ast.FunctionDef
Place = tuple[int, int]  # line from 1, column in UTF-8 bytes


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
    assigned = {
        node.id
        for node in ast.walk(function)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    renamed = [name for name, _ in used.most_common() if name in assigned - fixed]
    free = (name for name in short_names() if name not in used and name not in fixed)
    return dict(zip(renamed, free, strict=False))


def edits(tree: ast.Module) -> dict[Place, tuple[str, str]]:
    """Where a name changes, with the old and the new name."""
    found = {}
    for function in outer_functions(tree.body):
        names = new_names(function)
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and node.id in names:
                found[node.lineno, node.col_offset] = (node.id, names[node.id])
    return found


def shorten(text: str) -> str:
    """The same program with short names of local variables."""
    lines = text.encode().splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]
    data = text.encode()
    pieces, end = [], 0
    for (line, column), (old, new) in sorted(edits(ast.parse(text)).items()):
        start = starts[line - 1] + column
        pieces += [data[end:start], new.encode()]
        end = start + len(old.encode())
    return b"".join([*pieces, data[end:]]).decode()


def differs(text: str, shortened: str) -> str:
    """Why `shortened` is not the program of `text`, or "" if it is.

    Both trees must be equal but for the names of local variables, and in each function one name
    must stand for one name, both ways, with parameters and global names standing for themselves.
    """
    before, after = ast.parse(text), ast.parse(shortened)
    pairs = zip(outer_functions(before.body), outer_functions(after.body), strict=False)
    for old, new in pairs:
        forth: dict[str, str] = {}
        back: dict[str, str] = {}
        names = zip(name_nodes(old), name_nodes(new), strict=False)
        for a, b in names:
            if forth.setdefault(a.id, b.id) != b.id or back.setdefault(b.id, a.id) != a.id:
                return f"{old.name}: {a.id} became {b.id}"
        if changed := [name for name in fixed_names(old) & forth.keys() if forth[name] != name]:
            return f"{old.name}: {changed[0]} is not local"
        if outside := [a for a, b in forth.items() if a != b and not is_assigned(old, a)]:
            return f"{old.name}: {outside[0]} is not assigned here"
        restore(new, back)
    return "" if ast.dump(before) == ast.dump(after) else "the trees differ"


def name_nodes(function: Function) -> list[ast.Name]:
    """The plain names of a function in the order of the tree."""
    return [node for node in ast.walk(function) if isinstance(node, ast.Name)]


def is_assigned(function: Function, name: str) -> bool:
    """Whether a function assigns to a name."""
    return any(node.id == name and isinstance(node.ctx, ast.Store) for node in name_nodes(function))


def restore(function: Function, names: Mapping[str, str]) -> None:
    """Gives a function's names back what they were, in place."""
    for node in name_nodes(function):
        node.id = names[node.id]
