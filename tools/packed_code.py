"""Packs a Python source so small that it counts for little, and takes it out again.

The packed file is Python that unpacks itself with the standard library. The text inside is the
readable source without comments, docstrings, the texts of knobs, what it says of the names of other
programs, annotations that nothing reads and definitions that nothing uses, and with short names for
local variables. `pack_code` proves that by comparing syntax trees. `unpack_code` gives text and
hash of the source back without running anything.
"""

from __future__ import annotations

import ast
import bz2
import functools
import io
import itertools
import lzma
import re
import tokenize
from collections.abc import Callable
from typing import Any, NamedTuple

from digests import sha256
from shorten import differs, shorten

from train_gpt import UsageError

PACKED = "train_gpt.py"
READABLE = "train_gpt_readable.py"
LARGEST_TEXT = 10_000_000  # bytes that a packed file may unpack to

# Decorators that read no annotations. Triton reads tl.constexpr, so others keep them.
PLAIN_DECORATORS = {
    "staticmethod",
    "classmethod",
    "property",
    "contextlib.contextmanager",
    "torch.no_grad()",
}

# Tables of train_gpt.py whose contents stay behind.
TABLES_OF_NAMES = {"ABSENT", "WARNED"}


# === Leaving out what nothing needs ===============================================================
def mentioned_names(nodes: list[ast.stmt]) -> set[str]:
    """Every name, attribute and string in these statements that could refer to a definition."""
    names = set()
    for statement in nodes:
        for node in ast.walk(statement):
            for field in ("id", "attr", "value"):
                value = getattr(node, field, None)
                if isinstance(value, str) and value:
                    names.add(value)
                    break
    return names


def live_statements(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements of a module without functions and classes that nothing mentions: only tools
    use them.
    """
    live = []
    waiting = []
    for statement in body:
        is_definition = isinstance(statement, (ast.FunctionDef, ast.ClassDef))
        if is_definition and not statement.decorator_list:
            waiting.append(statement)
        else:
            live.append(statement)
    names = mentioned_names(live)
    while found := [definition for definition in waiting if definition.name in names]:
        live += found
        waiting = [definition for definition in waiting if definition not in found]
        names |= mentioned_names(found)
    return [statement for statement in body if statement in live]


# Calls that make a schema of the annotations of functions they are given.
SCHEMA_MAKERS = ("custom_op", "define_operator")
KNOB = "knob"  # the call that makes a field of the configuration; its second argument is a text


def called_name(call: ast.Call) -> str:
    """The last part of the name of what a call calls."""
    return ast.unparse(call.func).rpartition(".")[2]


def schema_functions(tree: ast.Module) -> set[str]:
    """Names of the functions of whose annotations a schema is made."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and called_name(node) in SCHEMA_MAKERS:
            names |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names


class Cut(NamedTuple):
    """Bytes of a source that give way to others."""

    start: int
    end: int
    replacement: bytes


class Stripper(ast.NodeVisitor):
    """Takes what does not travel out of a source's syntax tree, and notes the same cuts of its
    text.

    That is docstrings, the texts of knobs, TABLES_OF_NAMES, annotations that nothing reads, and
    top-level definitions that nothing mentions. Fields of classes keep their annotations. So do
    functions under any decorator but a plain one, and those of which torch.library makes a schema.
    """

    def __init__(self, source: bytes):
        """Strips a source; `tree` is what is left of it. Raises UsageError if it is no Python."""
        self.source = source
        self.cuts: list[Cut] = []
        try:
            self.tree = ast.parse(source)
        except (SyntaxError, ValueError) as error:
            raise UsageError(f"{READABLE}: no Python ({error})") from error
        lengths = map(len, source.splitlines(keepends=True))
        self.line_starts = [0, *itertools.accumulate(lengths)]
        self.with_schema = schema_functions(self.tree)
        self.keep_docstrings = "__doc__" in mentioned_names(self.tree.body)
        live = live_statements(self.tree.body)
        for statement in self.tree.body:
            if statement not in live:
                self.cut(statement)
        self.tree.body = live
        self.visit(self.tree)

    def start_of(self, node: Any) -> int:
        """The byte at which a node begins."""
        return self.line_starts[node.lineno - 1] + node.col_offset

    def end_of(self, node: Any) -> int:
        """The byte after a node."""
        return self.line_starts[node.end_lineno - 1] + node.end_col_offset

    def cut(self, node: ast.stmt | ast.expr, replacement: bytes = b"") -> None:
        """Cuts a statement or an expression."""
        self.cuts.append(Cut(self.start_of(node), self.end_of(node), replacement))

    def cut_annotation(self, mark: bytes, annotation: ast.expr) -> None:
        """Cuts an annotation, the mark before it, and the parentheses a formatter may have put
        around it.
        """
        before = self.start_of(annotation)
        start = self.source.rindex(mark, 0, before)
        end = self.end_of(annotation)
        for _ in range(self.source.count(b"(", start, before)):
            end = self.source.index(b")", end) + 1
        self.cuts.append(Cut(start, end, b""))

    def generic_visit(self, node: ast.AST) -> None:
        """Cuts the docstring of whatever may have one."""
        may_have_docstring = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        is_looked_at = may_have_docstring and not self.keep_docstrings
        if is_looked_at and ast.get_docstring(node, clean=False) is not None:
            docstring, *rest = node.body
            self.cut(docstring, b"" if rest else b"pass")
            node.body = rest or [ast.Pass()]
        super().generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Cuts the annotations of a function, unless something may read them."""
        decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
        if node.name not in self.with_schema and decorators <= PLAIN_DECORATORS:
            if node.returns:
                self.cut_annotation(b"->", node.returns)
                node.returns = None
            for argument in ast.walk(node.args):
                if isinstance(argument, ast.arg) and argument.annotation:
                    self.cut_annotation(b":", argument.annotation)
                    argument.annotation = None
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Cuts the text of a knob, which only --knobs and docs/knobs.md show."""
        if called_name(node) == KNOB:
            self.cut(node.args[1], b'""')
            node.args[1] = ast.Constant("")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Empties the tables of other programs' names, which only help people to set knobs."""
        names = {target.id for target in node.targets if isinstance(target, ast.Name)}
        if names & TABLES_OF_NAMES:
            self.cut(node.value, b"{}")
            node.value = ast.Dict([], [])
        self.generic_visit(node)

    def text(self) -> str:
        """The source after all cuts, squeezed."""
        text = self.source
        for cut in sorted(self.cuts, reverse=True):
            text = text[: cut.start] + cut.replacement + text[cut.end :]
        return squeeze(text.decode())


# === Leaving out what stands between tokens =======================================================
UNSEEN_TOKENS = ("INDENT", "DEDENT", "NL", "COMMENT", "ENDMARKER")


def squeeze(text: str) -> str:
    """Python without comments, blank lines and spaces that nothing needs.

    Literals stay as they are written. So the text is the same whatever Python makes it, and runs on
    as old a one as the source: f-strings changed in 3.12.
    """
    line_starts = [0, *itertools.accumulate(map(len, io.StringIO(text)))]
    parts: list[str] = []
    depth = 0
    fstring_starts: list[int] = []  # of the f-strings that are open
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        word = token.string
        if kind == "INDENT":
            depth += 1
        elif kind == "DEDENT":
            depth -= 1
        elif kind == "FSTRING_START":
            fstring_starts.append(line_starts[token.start[0] - 1] + token.start[1])
        elif kind == "FSTRING_END":
            end = line_starts[token.end[0] - 1] + token.end[1]
            word = text[fstring_starts.pop() : end]
        if kind in UNSEEN_TOKENS or fstring_starts:
            continue
        if kind == "NEWLINE":
            parts.append("\n")
        else:
            parts.append(space_before(word, parts, depth) + word)
    return "".join(parts)


def space_before(word: str, parts: list[str], depth: int) -> str:
    """The spaces that a token needs after the text before it, in a block of this depth."""
    last = parts[-1][-1] if parts else "\n"
    if last == "\n":
        return " " * depth
    return " " if is_word(last) and is_word(word[:1]) else ""


def is_word(character: str) -> bool:
    """Whether a character could be part of a name or number."""
    return character == "_" or character.isalnum()


# === The packed file ==============================================================================
# The text is Latin-1, the densest a Python file can hold: 2 % more than raw bytes, where base85
# takes 25 %. linecache lets Triton and tracebacks find the source; train_gpt.py logs UNPACKED, and
# counts the bytes of this very file.
HEAD = (
    "# coding: latin-1; train_gpt_readable.py without comments, "
    "by tools/pack.py, which also proves it\n"
    "import linecache,{0}\n"
    "UNPACKED={0}.decompress('''"
)
TAIL = """'''.encode('latin-1')).decode(),'{}'
linecache.cache[__file__]=1,None,UNPACKED[0].splitlines(True),__file__
exec(compile(UNPACKED[0],__file__,'exec'))
"""
TAIL_PATTERN = re.escape(TAIL).replace(re.escape("{}"), "([0-9a-f]{64})") + r"\Z"
QUOTES = "'''"


class Codec(NamedTuple):
    """A compressor of the standard library."""

    compress: Callable[[bytes], bytes]
    decompressor: Callable[[], Any]


def compress_lzma(data: bytes) -> bytes:
    """LZMA in the older container, which is smaller."""
    return lzma.compress(data, lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)


# The names are those of their modules.
CODECS = {
    "bz2": Codec(bz2.compress, bz2.BZ2Decompressor),
    "lzma": Codec(compress_lzma, lzma.LZMADecompressor),
}


def escape(data: bytes) -> str:
    """The text that stands for these bytes between triple quotes in a Latin-1 file."""
    text = data.decode("latin-1").replace("\\", "\\\\").replace("\r", "\\r")
    text = re.sub("\0(?=[0-7])", r"\\x00", text)  # \0 and a digit would be an octal number
    text = text.replace("\0", "\\0")
    return re.sub(r"'(?=''|\Z)", r"\\'", text)


@functools.cache
def text_to_pack(source: bytes) -> str:
    """The text that travels. Raises UsageError if it would be another program than the source."""
    stripper = Stripper(source)
    stripped = stripper.text()
    text = shorten(stripped)
    is_same = ast.dump(ast.parse(stripped)) == ast.dump(stripper.tree)
    if not is_same or differs(stripped, text):
        reason = "is written in a way that tools/pack.py cannot shorten without changing it"
        raise UsageError(f"{READABLE}: {reason}")
    return text


@functools.cache
def same_program(source: bytes, text: str) -> bool:
    """Whether a text is what is left of a readable source, whatever its local names."""
    return not differs(Stripper(source).text(), text)


@functools.cache
def pack_code(source: bytes) -> bytes:
    """The packed file of a readable source, by whichever codec makes it smaller.

    Raises UsageError if the text in it is not the same program.
    """
    text = text_to_pack(source)
    files = []
    for name, codec in CODECS.items():
        literal = escape(codec.compress(text.encode()))
        file = HEAD.format(name) + literal + TAIL.format(sha256(source))
        files.append(file.encode("latin-1"))
    return min(files, key=len)


def packed_size(source: bytes) -> int:
    """Bytes that count for a readable source."""
    return len(pack_code(source))


class Unpacked(NamedTuple):
    """The contents of a packed file."""

    text: str
    sha256: str  # of the readable source


def unpack_code(packed: bytes) -> Unpacked:
    """Text and hash of the readable source in a packed file, which is not run.

    Raises UsageError if it is any other file.
    """
    file = packed.decode("latin-1")
    tail = re.search(TAIL_PATTERN, file)
    names = [name for name in CODECS if file.startswith(HEAD.format(name))]
    try:
        if not tail or not names:
            raise ValueError("another beginning or end")
        literal = file[len(HEAD.format(names[0])) - len(QUOTES) : tail.start() + len(QUOTES)]
        decompressor = CODECS[names[0]].decompressor()
        data = ast.literal_eval(literal).encode("latin-1")
        text = decompressor.decompress(data, LARGEST_TEXT).decode()
        ast.parse(text)
        if not decompressor.eof or decompressor.unused_data:
            raise ValueError("more or less than one compressed text")
    except (ValueError, SyntaxError, AttributeError, OSError, EOFError, lzma.LZMAError) as error:
        reason = "not a file that tools/pack.py wrote, or changed since"
        raise UsageError(f"{PACKED}: {reason}") from error
    return Unpacked(text, tail[1])
