"""Plain English: docstrings begin with a noun or a verb, and nothing that people read has a phrase that sounds translated."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "asyncdiff_nodes").rglob("*.py"))
BEGINNINGS = ("Of ", "Which ", "Whose ", "By ")
# each was in a text of ours once; in brackets, what to write
PHRASES = [
    "and says so",  # and tells you
    "as much less",
    "that is no fault",
    "turns? the question round",
    r"(hangs?|hung) on (it|its|a|the|one)\b",  # is attached to, is put on
    "ha(s|ve) none of it",
    "of which the median",  # whose median
    "has not its",  # does not have its
    "what there is more",  # the rest
    "none in particular",
    "have taken their place",  # have taken over
    "going on without",  # continues without
    "in mid-?run;",  # during the run
    "call that is due",  # current call
    "cannot be told",  # is unknown
    "in a way (of its own|that is not known)",  # in its own way, in an unknown way
    "is no (MODEL|number|plain|function)",  # is not a
    "was not what",  # differs from
    "as far as can be foretold",
    "lately",  # recently
]
TRANSLATED = re.compile("|".join(PHRASES), re.MULTILINE)


def docstrings(tree):
    """Line and text of each docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            yield node.body[0].lineno, ast.get_docstring(node)


def strings(tree):
    """Line and text of each string, docstrings too; an f-string has {} for its values."""
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.lineno, node.value


@pytest.fixture(scope="module")
def trees():
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def test_docstrings_begin_with_a_noun_or_a_verb(trees):
    found = [
        f"{file}:{line}: {text.splitlines()[0]}"
        for file, tree in trees.items()
        for line, text in docstrings(tree)
        if text.startswith(BEGINNINGS)
    ]
    assert not found, "\n".join(found)


def test_no_text_has_a_phrase_that_sounds_translated(trees):
    found = [
        f"{file}:{line + text.count(chr(10), 0, match.start())}: {match[0]!r}"
        for file, tree in trees.items()
        for line, text in strings(tree)
        if (match := TRANSLATED.search(text))
    ]
    assert not found, "\n".join(found)
