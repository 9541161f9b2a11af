"""Functions, classes and modules of the Python standard library, read from its sources without importing them."""

import ast
import hashlib
import inspect
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

HELD_OUT_PERCENT = 8  # of sources, not of conversations

# Absent from some installations, generated, tables of data, or near-copies of another module (which would let a
# held-out function be seen in training).
_SKIPPED_FOLDERS = {
    "test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages", "turtledemo", "lib-dynload",
    "__pycache__", "tkinter", "ensurepip", "pydoc_data", "__phello__", "distutils", "idle_test",
}  # fmt: skip
_SKIPPED_MODULES = {"ntpath", "this", "antigravity", "_pydatetime", "_pydecimal", "_pyio", "_pylong"}


@dataclass(frozen=True)
class Definition:
    """One definition of the standard library, documented or not.

    Attributes:
        module: dotted name.
        kind: "module", "class", "function" or "method".
        name: dotted, starting with the module.
        header: the signature line (`def f(x):`), empty for modules.
        doc: the cleaned docstring, or "".
        body: source of a function's statements after the docstring, indented by four spaces; "" for other kinds.
    """

    module: str
    kind: str
    name: str
    header: str
    doc: str
    body: str


def split_of(source: str) -> str:
    """'heldout' for about HELD_OUT_PERCENT of the sources, else 'train': a pure function of the name."""
    # Not Python's `hash`, which differs between processes for text.
    bucket = int.from_bytes(hashlib.sha256(source.encode()).digest()[:8], "big") % 100
    return "heldout" if bucket < HELD_OUT_PERCENT else "train"


@lru_cache(maxsize=1)
def definitions() -> tuple[Definition, ...]:
    """Every definition of the standard library, sorted by module then by place in the file."""
    found: list[Definition] = []
    for module, path in _source_files():
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
            # A file of another encoding or syntax is left out.
            continue
        found.extend(_of_module(module, tree, source.splitlines()))

    return tuple(found)


def _source_files() -> list[tuple[str, Path]]:
    # Read as text and never imported: some modules act when they are.
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS & set(parts[:-1]) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        # A package is known by its folder's name.
        if parts[-1] == "__init__":
            parts = parts[:-1]

        name = ".".join(parts)
        if name and name not in _SKIPPED_MODULES and not parts[-1].startswith("test_"):
            files.append((name, path))

    return sorted(files)


def _of_module(module: str, tree: ast.Module, lines: list[str]) -> Iterator[Definition]:
    yield Definition(module, "module", module, "", _doc(tree), "")
    yield from _of_statements(module, module, tree.body, lines, "function")


def _of_statements(
    module: str, prefix: str, statements: list[ast.stmt], lines: list[str], kind: str
) -> Iterator[Definition]:
    for node in statements:
        if isinstance(node, ast.FunctionDef):
            name = f"{prefix}.{node.name}"
            yield Definition(module, kind, name, _header(node, lines), _doc(node), _body(node, lines))
        elif isinstance(node, ast.ClassDef):
            name = f"{prefix}.{node.name}"
            # A class by its description alone: its methods, which follow, are definitions of their own.
            yield Definition(module, "class", name, f"class {node.name}:", _doc(node), "")
            yield from _of_statements(module, name, node.body, lines, "method")


def _doc(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> str:
    text = ast.get_docstring(node, clean=False) or ""
    # ASCII only: other characters would take room in the small vocabulary of the embedded tokenizer.
    text = inspect.cleandoc(text).strip()
    return text if text.isascii() else ""


def _header(node: ast.FunctionDef, lines: list[str]) -> str:
    try:
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"def {node.name}({ast.unparse(node.args)}){returns}:"
    except (ValueError, RecursionError):
        return lines[node.lineno - 1].strip()


def _body(node: ast.FunctionDef, lines: list[str]) -> str:
    """The source lines after the docstring at an indentation of four spaces, comments kept; "" if there is none."""
    statements = node.body[1:] if ast.get_docstring(node) is not None else node.body
    if not statements or statements[0].lineno <= node.lineno:
        return ""

    # After the docstring's last line, or at the first statement; lines count from 1, the list from 0. A definition's
    # line is that of `def` or `class`, below its decorators.
    decorators = getattr(statements[0], "decorator_list", [])
    opening = min(part.lineno for part in (statements[0], *decorators))
    first = node.body[0].end_lineno if statements is not node.body else opening - 1
    block = lines[first : node.end_lineno]
    # Methods are shown as functions: their body is moved to the left by the class's indentation.
    indent = node.col_offset
    # A line may stand left of the function, as within a string of several lines.
    shifted = [line[indent:] if not line[:indent].strip() else line.lstrip() for line in block]
    text = "\n".join(line.rstrip().expandtabs(4) for line in shifted).strip("\n")

    return text if text.isascii() else ""
