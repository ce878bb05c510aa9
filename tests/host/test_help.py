"""What the page and the registry read of the pack: help and translations of every node, and pyproject.toml."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from comfy_config.config_parser import extract_node_configuration
from PIL import Image

import asyncdiff_nodes
from asyncdiff_nodes.nodes import AsyncDiffExtension

ROOT = Path(__file__).resolve().parents[2]
HELP = ROOT / "js" / "docs"
NODES = asyncio.run(AsyncDiffExtension().get_node_list())
SCHEMAS = {schema.node_id: schema for schema in (node.define_schema() for node in NODES)}
CHINESE = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
PAGES = {"en": "{}.md", "zh": "{}/zh.md"}  # the page falls back to the first for every language without a file
TITLES = {
    "en": {name: schema.display_name for name, schema in SCHEMAS.items()},
    "zh": {name: node["display_name"] for name, node in CHINESE.items()},
}


@pytest.mark.parametrize("language", PAGES)
@pytest.mark.parametrize("name", SCHEMAS)
def test_help(name, language):
    text = (HELP / PAGES[language].format(name)).read_text(encoding="utf-8")
    assert text.startswith(f"# {TITLES[language][name]}\n")
    pictures = re.findall(r"!\[.+?\]\((.+?)\)", text)
    assert pictures == [f"images/{name}.png"]  # relative to docs/ in every language
    assert (HELP / pictures[0]).stat().st_size < 40_000
    # the first column of the table of inputs names inputs by their ids
    tables = re.findall(r"^\| (?:input|输入) \|.*\n\|---\|---\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    named = {word for table in tables for row in table.splitlines() for word in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named <= {entry.id for entry in SCHEMAS[name].inputs}


def test_help_is_of_these_nodes_only():
    assert {path.stem for path in HELP.glob("*.md")} == set(SCHEMAS)
    assert {path.parent.name for path in HELP.glob("*/*.md")} == set(SCHEMAS)
    assert {path.stem for path in (HELP / "images").iterdir()} == set(SCHEMAS)


def shape(node):
    """The keys of a node's translation, all the way down."""
    return {key: shape(value) if isinstance(value, dict) else "text" for key, value in node.items()}


def wanted(schema):
    """What there is to translate of a node; an output without a name of its own shows its type, which the host translates."""
    inputs = {entry.id: {"name": "text", "tooltip": "text"} for entry in schema.inputs}
    outputs = {}
    for index, entry in enumerate(schema.outputs):
        texts = {"name": entry.display_name, "tooltip": entry.tooltip}
        outputs[str(index)] = {key: "text" for key, value in texts.items() if value}
    every = {"display_name": "text", "description": "text", "inputs": inputs, "outputs": outputs}
    return {key: value for key, value in every.items() if value}


def test_chinese_has_every_text_and_no_other():
    assert {name: shape(node) for name, node in CHINESE.items()} == {name: wanted(schema) for name, schema in SCHEMAS.items()}


def test_chinese_is_plain_text():
    texts = re.findall(r'": "(.*)"', json.dumps(CHINESE, ensure_ascii=False, indent=0))
    assert len(texts) > 60
    # the page's translator gives a meaning of its own to these
    assert not [text for text in texts if not text or set(text) & set("{}|@")]


def test_pyproject_as_the_host_reads_it():
    found = extract_node_configuration(str(ROOT))
    project, comfy = found.project, found.tool_comfy
    assert project.name == "comfyui-asyncdiff"
    assert project.version == asyncdiff_nodes.__version__
    assert project.license.text == "Apache-2.0"
    assert project.urls.repository.startswith("https://github.com/")
    assert project.urls.documentation.startswith(project.urls.repository)
    assert project.urls.issues.startswith(project.urls.repository)
    assert project.supported_os == ["Microsoft :: Windows", "POSIX :: Linux"]
    assert project.supported_accelerators == ["GPU :: NVIDIA CUDA"]
    assert project.supported_comfyui_version == ">=0.3.64"
    assert project.dependencies == []
    assert (comfy.publisher_id, comfy.display_name) == ("comfyui-asyncdiff", "AsyncDiff")
    assert comfy.web is None  # with WEB_DIRECTORY, the page's files would be loaded twice


@pytest.mark.parametrize("key, size", [("Icon", (400, 400)), ("Banner", (1470, 630))])
def test_pictures_of_the_registry(key, size):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    path = re.search(rf'^{key} = "https://raw\.githubusercontent\.com/[\w-]+/[\w-]+/main/(.+)"', text, re.MULTILINE)[1]
    assert (ROOT / path).stat().st_size < 100_000
    with Image.open(ROOT / path) as picture:
        assert picture.size == size
