"""Text cut into documents: lines joined, long texts cut at their seams, and the text that ships inside CPython."""

from __future__ import annotations

import ast
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

_PASSAGE = 1_500  # characters at which a passage made of lines ends
_LONG_DOCUMENT = 12_000  # characters; longer documents are cut, else one of them would be most of a part
_BLOCK = 8_000
_CUTS = ((r"\n\s*\n", "\n\n"), (r"\n", "\n"), (r"(?<=[.!?]) ", " "))
_HEADING = re.compile(r"^ ?= [^=].*=\s*$")
_RULE = re.compile(r"^\s*[+|][-=+|\s]*$")  # of a table
_UNDERLINE = re.compile(r"^([*=\-~^\"])\1{2,}$")


def passages(rows: Iterable[str]) -> Iterator[str]:
    """Join lines into passages of about `_PASSAGE` characters, a page's heading always starting a new one."""
    lines: list[str] = []
    for row in rows:
        if lines and (_HEADING.match(row) or sum(map(len, lines)) >= _PASSAGE):
            yield "\n".join(lines)
            lines = []
        if row.strip():
            lines.append(row.strip())
    yield "\n".join(lines)


def blocks(text: str, longest: int = _LONG_DOCUMENT, size: int = _BLOCK) -> Iterator[str]:
    """Cut a text longer than `longest` characters into blocks of `size` characters or a little more.

    The cuts are at blank lines; where they do not do, at line ends or at the ends of sentences.
    """
    if len(text) <= longest:
        yield text
        return
    fine = (cut for cut in _CUTS if max(map(len, re.split(cut[0], text))) <= longest)
    pattern, glue = next(fine, _CUTS[-1])
    block: list[str] = []
    for piece in re.split(pattern, text):
        block.append(piece)
        if sum(map(len, block)) >= size:
            yield glue.join(block)
            block = []
    yield glue.join(block)


def _sections(text: str) -> Iterator[str]:
    """Cut a help topic at its underlined headings.

    The underlines go: the same section stands under different ones in several topics, and must count once.
    """
    lines: list[str] = []
    for line in text.splitlines():
        if _UNDERLINE.match(line) and lines and len(lines[-1]) == len(line):
            title = lines.pop()
            yield "\n".join(lines)
            lines = [title]
        elif not _RULE.match(line):
            lines.append(line)
    yield "\n".join(lines)


def pydoc() -> Iterator[str]:
    """Yield the sections of Python's own help topics."""
    from pydoc_data.topics import topics  # half a megabyte of text

    for _, topic in sorted(topics.items()):
        for section in _sections(topic):
            yield from blocks(section, _PASSAGE, 1_000)


def stdlib() -> Iterator[str]:
    """Yield the docstrings of the standard library's modules, classes and functions; nothing is imported."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError):  # a file that this build leaves out or encodes otherwise
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from blocks(ast.get_docstring(node) or "", _PASSAGE, 1_000)


EMBEDDED: dict[str, Callable[[], Iterator[str]]] = {"pydoc": pydoc, "stdlib": stdlib}
"""Text that ships inside CPython: the language reference behind `help()`, and the docstrings of its library."""
