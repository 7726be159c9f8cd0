"""Short names of local variables leave the program as it is, and the proof of that can fail."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from shorten import differs, shorten


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(x):\n value=x\n return value", "def f(x):\n a=x\n return a"),
        # The most frequent name gets the first letter; names in use are passed over.
        (
            "def f(a):\n once=a\n twice=once\n return twice+twice+b",
            "def f(a):\n d=a\n c=d\n return c+c+b",
        ),
        # A closure and a comprehension see the same variable.
        (
            "def f(x):\n big=x\n def g():\n  return big\n return[big for item in x]",
            "def f(x):\n a=x\n def g():\n  return a\n return[a for b in x]",
        ),
        # Text before a name may take more bytes than characters.
        ("def f():\n big='é漢';huge=big", "def f():\n a='é漢';b=a"),
        # What others may refer to stays.
        ("value=1\nclass A:\n field=value", "value=1\nclass A:\n field=value"),
        ("def f(name=1):\n return f(name=name)", "def f(name=1):\n return f(name=name)"),
        ("def f():\n global count\n count=1", "def f():\n global count\n count=1"),
        ("def f():\n import numpy\n numpy=numpy", "def f():\n import numpy\n numpy=numpy"),
        ("def f():\n def inner():pass\n inner=1", "def f():\n def inner():pass\n inner=1"),
        ("def f(x):\n big=x\n return f'{big}'", "def f(x):\n big=x\n return f'{big}'"),
        (
            "def f():\n try:pass\n except E as error:\n  error=error",
            "def f():\n try:pass\n except E as error:\n  error=error",
        ),
        ("def f(x):\n x.field=1\n x[key]=len", "def f(x):\n x.field=1\n x[key]=len"),
    ],
)
def test_only_names_that_nothing_else_can_mean_become_short(source, expected):
    assert shorten(source) == expected
    assert differs(source, expected) == ""


@pytest.mark.parametrize(
    ("shortened", "reason"),
    [
        ("def f(x):\n a=x\n b=2\n return b+len(a)", "f: one and b do not stand for each other"),
        ("def f(x):\n x=x\n b=2\n return x+len(b)", "f: x and x do not stand for each other"),
        ("def f(x):\n len=x\n b=2\n return len+len(b)", "do not stand for each other"),
        ("def f(x):\n a=x\n b=2\n return a+c(b)", "f: len is not local"),
        ("def f(y):\n a=y\n b=2\n return a+len(b)", "f: x is not local"),
        ("def f(x):\n a=x\n b=3\n return a+len(b)", "the trees differ"),
        ("def f(x):\n a=x\n b=2\n return a+len(b)\ng()", "the trees differ"),
    ],
)
def test_another_program_is_told_with_the_reason(shortened, reason):
    source = "def f(x):\n one=x\n two=2\n return one+len(two)"
    assert differs(source, "def f(x):\n a=x\n b=2\n return a+len(b)") == ""
    assert reason in differs(source, shortened)


def test_a_short_name_that_captures_another_is_told():
    source = "def f():\n def g():pass\n big=1\n return big"
    assert "means something else" in differs(source, source.replace("big", "g"))


def test_the_script_is_the_same_program_with_short_names():
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    shortened = shorten(source)
    assert len(shortened) < 0.95 * len(source)
    assert differs(source, shortened) == ""
    assert differs(source, shortened.replace("momentum", "momenta", 1)) != ""
