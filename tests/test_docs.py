"""The tables of the pages are those of the committed data."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import quality_page  # noqa: E402


@pytest.mark.parametrize("page", quality_page.PAGES)
def test_tables_are_those_of_the_data(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert quality_page.MARKED.search(text), "no table is marked"
    assert quality_page.filled(text) == text, "run python tools/quality_page.py"
