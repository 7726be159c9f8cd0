"""The layout that the code keeps: short functions, docstrings, and names in the tour that exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from conftest import ROOT

import train_gpt as tg

FILES = [ROOT / "train_gpt.py", *sorted((ROOT / "tools").glob("*.py"))]
MOST_LINES = 60
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.name)
def tree(request: pytest.FixtureRequest) -> ast.Module:
    return ast.parse(request.param.read_text(encoding="utf-8"))


def public_definitions(tree: ast.AST) -> Iterator[ast.AST]:
    """Functions, classes and methods without a leading underscore; none inside functions."""
    for node in ast.iter_child_nodes(tree):
        is_definition = isinstance(node, (*FUNCTIONS, ast.ClassDef))
        if is_definition and node.name.startswith("_"):
            continue
        if is_definition:
            yield node
        if not isinstance(node, FUNCTIONS):
            yield from public_definitions(node)


def test_no_function_is_longer_than_a_screen(tree):
    """Docstring, comments and signature count; decorators do not."""
    long = {}
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            lines = node.end_lineno - node.lineno + 1
            if lines > MOST_LINES:
                long[node.name] = lines
    assert long == {}


def test_every_public_class_and_function_says_what_it_does(tree):
    silent = [node.name for node in public_definitions(tree) if not ast.get_docstring(node)]
    assert silent == []
    assert ast.get_docstring(tree)


def find(name: str) -> object | None:
    """What a dotted name leads to in train_gpt.py, or None."""
    found = tg
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def test_every_function_that_the_tour_names_exists():
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    # Blocks of code are recipes' examples, which name what does not exist yet.
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    names = re.findall(r"`([A-Za-z_]\w*(?:\.\w+)*)\(\)`", text)
    assert len(names) > 20
    assert [name for name in names if not callable(find(name))] == []
