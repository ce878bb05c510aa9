"""The pages say what is so: their tables are those of the committed data, their counts and paths those of the tree, and no link
leads nowhere. ``make docs`` builds them.
"""

import json
import re
import sys
from pathlib import Path

import pytest

from asyncdiff_nodes.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools" / "measure"))

import tables  # noqa: E402

PAGES = ["README.md", "CHANGELOG.md", *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md")))]
HELP = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "js" / "docs").glob("*.md"))]
NUMBERS = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
)
GITHUB = "https://github.com/comfyui-asyncdiff/ComfyUI-AsyncDiff/blob/main/"
# what the words count
WORKFLOWS = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))
NODES = [path.stem for path in (ROOT / "js" / "docs").glob("*.md")]  # tests/host/test_help.py: a page for every node
LANGUAGES = [path for path in (ROOT / "locales").iterdir() if path.is_dir()]
COUNTS = {"workflows": len(WORKFLOWS), "nodes": len(NODES), "languages": len(LANGUAGES)}


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def section(page, title):
    """Of a page, from one of its headings to the next."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", read(page), re.MULTILINE | re.DOTALL)[1]


@pytest.mark.parametrize("page", tables.PAGES)
def test_tables_are_those_of_the_data(page):
    text = read(page)
    assert tables.MARKED.search(text), "no table is marked"
    assert tables.filled(text, page) == text, "run python tools/measure/tables.py"


def test_the_readme_has_the_speed_of_bands():
    rows = json.loads(read("docs/data/bands.json"))["rows"]
    gains = [row["run_speedup"] for row in rows if row["plan"] == "bands"]
    steps = [row["steps"] for row in rows]
    text = " ".join(read("README.md").split())
    assert f"runs of {min(steps)} to {max(steps)} steps gain {min(gains):.2f}x to {max(gains):.2f}x on two CPUs" in text


def test_no_choice_is_slower_than_one_device():
    rows = [row for row in json.loads(read("docs/data/projected.json"))["rows"] if row["chosen"]]
    runs = {(row["network"], row["devices"], row["cfg"], row["link"], row["steps"]) for row in rows}
    assert len(rows) == len(runs) == 3 * 4 * 2 * 4 * 4 and min(row["run_speedup"] for row in rows) >= 1


def test_every_page_with_a_table_is_filled():
    assert {page for page in PAGES if tables.MARKED.search(read(page))} == set(tables.PAGES)


# -- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES + HELP)
def test_counts_are_those_of_the_tree(page):
    words = "|".join((*NUMBERS, r"\d+"))
    for number, what in re.findall(rf"\b({words}) ({'|'.join(COUNTS)})\b", read(page), re.IGNORECASE):
        count = int(number) if number.isdecimal() else NUMBERS.index(number.lower())
        assert count == COUNTS[what], f"{number} {what}, and there are {COUNTS[what]}"


@pytest.mark.parametrize("page", ["README.md", "docs/comfyui.md"])
@pytest.mark.parametrize("what", COUNTS)
def test_the_first_pages_count(page, what):
    assert re.search(rf"\b{NUMBERS[COUNTS[what]]} {what}\b", read(page), re.IGNORECASE)


def test_every_workflow_has_a_row():
    assert sorted(re.findall(r"^\| `(\w+)` \|", section("docs/comfyui.md", "Workflows"), re.MULTILINE)) == WORKFLOWS


def test_every_node_has_a_row():
    titles = {read(f"js/docs/{name}.md").partition("\n")[0].removeprefix("# ") for name in NODES}
    assert set(re.findall(r"^\| \*\*(.+?)\*\* \|", section("docs/comfyui.md", "Nodes"), re.MULTILINE)) == titles


def test_every_setting_has_a_row():
    names = re.findall(r'^    name: "(.+)",$', read("js/settings.js"), re.MULTILINE)
    rows = re.findall(r"^\| (.+?) \|", section("docs/comfyui.md", "Settings"), re.MULTILINE)
    assert names and sorted(rows[1:]) == sorted(names)


def test_every_command_has_a_section_and_doctor_is_first():
    sections = re.findall(r"^## (.+)$", read("docs/cli.md"), re.MULTILINE)
    assert sections[:2] == ["Install", "doctor"] and set(sections[1:]) == set(COMMANDS)
    assert set(re.findall(r"^\| \[`([\w-]+)`\]", read("docs/cli.md"), re.MULTILINE)) == set(COMMANDS)


# -- the first screen ------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_begins_with_what_one_needs():
    text = read("README.md")
    assert len(text.splitlines()) <= 130
    first = text.partition("\n## ")[0]
    for needed in (
        "table pair of demo",
        "table gains of projected",
        "**Status:**",
        "pip install -r",
        "\nmake demo ",
        "\nmake test ",
    ):
        assert needed in first, needed
    assert 'pip install ".[cli]"' in text


# -- links and paths -------------------------------------------------------------------------------------------------


def anchor(title):
    """Of a heading, as GitHub and MkDocs make it."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"\[(.+?)\]\(.+?\)", r"\1", title).lower()).strip().replace(" ", "-")


def anchors(path):
    return {anchor(title) for title in re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES)
def test_no_link_leads_nowhere(page):
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, part = link.partition("#")
        if target.startswith(GITHUB):
            assert (ROOT / target.removeprefix(GITHUB)).exists(), link
        elif not target.startswith(("https://", "http://")):
            path = (ROOT / page).parent / target if target else ROOT / page
            assert path.exists(), link
            # MkDocs copies no file that is not below docs/
            assert not page.startswith("docs/") or (ROOT / "docs") in path.resolve().parents, link
            assert not part or "." in part or part in anchors(path), link  # with a dot: of the reference


@pytest.mark.parametrize("page", PAGES)
def test_paths_are_those_of_the_tree(page):
    """Of tests and tools anywhere, and of the package in the pages that say where to find what."""
    named = set(re.findall(r"`(?:python )?((?:tests|tools)/[\w/.-]+\.\w+)", read(page)))
    if page in ("docs/architecture.md", "docs/decisions.md"):
        rooms = re.findall(r"`((?:engine|host|nodes|models|demo|cli|cluster)/[\w/.-]*|js/[\w/.-]*|locales/)`", read(page))
        named |= {path if path.startswith(("js/", "locales/")) else f"asyncdiff_nodes/{path}" for path in rooms}
    assert not sorted(path for path in named if not (ROOT / path).exists())
