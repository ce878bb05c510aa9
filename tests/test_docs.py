"""The tables of the pages are those of the committed data."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools" / "measure"))

import tables  # noqa: E402


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_are_those_of_the_data(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert tables.MARKED.search(text), "no table is marked"
    assert tables.filled(text) == text, "run python tools/measure/tables.py"
