"""The shared workflows: shown by the page, accepted by the server, listed as templates, and run with small models."""

from __future__ import annotations

import base64
import io
import json
import os
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from frontend import PACK_FOLDER
from PIL import Image, ImageChops
from safetensors.torch import load_file

from asyncdiff_nodes.cli.comfyui import to_prompt
from helpers import checkpoints

WORKFLOWS = {path.stem: path for path in sorted(checkpoints.WORKFLOWS.glob("*.json"))}
DEMO = "asyncdiff_demo"  # its model comes with the pack; it is run by the test of its PNG
NOT_RUN = {name for name, path in WORKFLOWS.items() if {file for _, file in checkpoints.named(path)} & checkpoints.NOT_SMALL}
SLOW = {"asyncdiff_inpaint"}  # another network: its ranks have to be started, those of the others are shared
RUN = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in WORKFLOWS if name not in {DEMO, *NOT_RUN}]
SMALL = {"width": 64, "height": 64, "steps": 5}
# the network that the test pack has in place of files which cannot be small
FAMILIES = {
    "asyncdiff_flux": "flux",
    "asyncdiff_ltx2": "ltx2",
    "asyncdiff_minimax_h3": "minimax_h3",
    "asyncdiff_qwen_image": "qwen_image",
    "asyncdiff_wan_video": "wan",
    "asyncdiff_z_image": "z_image",
}
FAST = {"asyncdiff_minimax_h3"}
NEWER, SINCE = {"asyncdiff_ltx2", "asyncdiff_minimax_h3"}, (0, 33)  # older ComfyUI lacks some of their nodes
EVENTS = """() => {
  if (!window.lines) app.api.addEventListener("progress_text", event => lines.push(event.detail.text));
  window.lines = [];
}"""
COMPLAINTS = """() => ({
  unknown: app.graph.nodes.filter(node => !LiteGraph.registered_node_types[node.type]).map(node => node.type),
  marked: app.graph.nodes.filter(node => node.has_errors).map(node => node.type),
  shown: [...document.querySelectorAll(".p-dialog, .p-toast-message, [data-testid=error-overlay]")].map(box => box.innerText),
})"""
WIDGETS = """() => Object.fromEntries(app.graph.nodes.filter(node => node.type.startsWith("AsyncDiff")).map(
  node => [node.id, (node.widgets ?? []).filter(widget => widget.serialize !== false).length]
))"""

each = pytest.mark.parametrize("name", WORKFLOWS)


@pytest.fixture(scope="module", autouse=True)
def files(server):
    """The models that the workflows name, and ComfyUI's example picture, as small as what is sampled."""
    models, picture = server.base / "models", server.base / "input" / "example.png"
    checkpoints.place_small(models)
    example = Image.open(Path(os.environ["ASYNCDIFF_HOST_UNDER_TEST"]) / "input" / "example.png")
    example.resize((64, 64), Image.Resampling.NEAREST).save(picture)
    yield
    for path in [picture, *models.rglob("*.safetensors")]:
        path.unlink()


@pytest.fixture(scope="module")
def infos(server):
    return server.get("/object_info")


def read(name):
    return json.loads(WORKFLOWS[name].read_text(encoding="utf-8"))


def needs_its_nodes(server, name):
    """Skip the test where this ComfyUI is older than a workflow's nodes."""
    version = server.get("/system_stats")["system"]["comfyui_version"]
    if name in NEWER and tuple(map(int, version.split("."))) < SINCE:
        pytest.skip(f"ComfyUI {version} has other nodes")


def of_nodes(workflow, kind):
    """By node."""
    return {node["id"]: node.get(kind) for node in workflow["nodes"]}


def accepted(server, prompt, client="asyncdiff"):
    """The id of a prompt in which the server finds no fault, not even in a part of it."""
    answer = server.post("/prompt", {"prompt": prompt, "client_id": client})
    assert answer["node_errors"] == {}
    return answer["prompt_id"]


def stop(server, prompt_id):
    """End a prompt that cannot, or need not, be run."""
    while not server.get(f"/history/{prompt_id}"):
        server.post("/interrupt", {})
        time.sleep(0.02)


def pictures(server, outputs):
    """Name without number, and picture."""
    found = [image for output in outputs.values() for image in output.get("images", []) if image["type"] == "output"]
    places = [Path(image["subfolder"]) / image["filename"] for image in found]
    return {str(place)[: -len("_00001_.png")]: Image.open(server.base / "output" / place) for place in places}


@each
def test_the_page_shows_it_without_complaint_and_saves_it_unchanged(frontend, server, name):
    needs_its_nodes(server, name)
    saved = read(name)
    frontend.load(saved)
    assert frontend.page.evaluate(COMPLAINTS) == {"unknown": [], "marked": [], "shown": []}
    again = frontend.serialize()
    assert again["links"] == saved["links"]
    if frontend.version < (1, 48):
        for node in saved["nodes"]:
            node.setdefault("widgets_values", [])  # as these pages write that there are none
    for kind in ("type", "title", "pos", "widgets_values"):
        assert of_nodes(again, kind) == of_nodes(saved, kind)
    counts = {str(node["id"]): len(node.get("widgets_values") or []) for node in saved["nodes"] if "AsyncDiff" in node["type"]}
    assert frontend.page.evaluate(WIDGETS) == counts


@each
def test_the_page_keeps_the_sizes_of_nodes(frontend, server, name):
    needs_its_nodes(server, name)
    frontend.needs(1, 28)  # before, it chose them itself
    saved = read(name)
    frontend.load(saved)
    assert of_nodes(frontend.serialize(), "size") == of_nodes(saved, "size")


@each
def test_the_server_accepts_what_the_page_makes_of_it(frontend, server, infos, name):
    needs_its_nodes(server, name)
    frontend.load(WORKFLOWS[name])
    prompt = frontend.prompt()
    own = to_prompt(read(name), infos)
    assert {key: node["class_type"] for key, node in prompt.items()} == {key: node["class_type"] for key, node in own.items()}
    for key, node in own.items():
        if node["class_type"].startswith("AsyncDiff"):
            assert prompt[key]["inputs"] == node["inputs"]
    stop(server, accepted(server, prompt))


@pytest.mark.parametrize("count", [8, 11])
def test_options_that_came_after_a_workflow_was_saved_have_their_defaults(frontend, count):
    saved = read("asyncdiff_sd15")
    (options,) = (node for node in saved["nodes"] if node["type"] == "AsyncDiffOptions")
    frontend.load(saved)
    expected = frontend.prompt()
    options["widgets_values"], options["inputs"] = options["widgets_values"][:count], options["inputs"][:count]
    frontend.load(saved)
    assert frontend.page.evaluate(COMPLAINTS) == {"unknown": [], "marked": [], "shown": []}
    assert frontend.prompt() == expected


@pytest.mark.parametrize("name", RUN)
def test_it_runs_on_two_ranks(frontend, server, name):
    frontend.load(WORKFLOWS[name])
    prompt = frontend.prompt()
    for node in prompt.values():
        inputs = node["inputs"]
        inputs.update({key: value for key, value in SMALL.items() if key in inputs})
        if node["class_type"] == "AsyncDiffOptions":
            inputs.update(devices="cpu, cpu", preset="Exact" if name == "asyncdiff_compare" else inputs["preset"])
    frontend.page.evaluate(EVENTS)
    history = server.wait(accepted(server, prompt, frontend.page.evaluate("app.api.clientId")))
    assert history["status"]["status_str"] == "success", history["status"]
    frontend.page.wait_for_function("lines.length > 0")
    (line,) = frontend.page.evaluate("lines")
    # exact; and at CFG 1, where a machine that is busy beside it may find bands slower than one device after three steps
    plans = {"asyncdiff_compare": ("2 segments",), "asyncdiff_turbo": ("2 bands", "2 segments")}
    expected = plans.get(name, ("2 branches of 1 segment",))
    assert line.startswith(tuple(f"AsyncDiff: {plan} on cpu, cpu" for plan in expected))
    made = pictures(server, history["outputs"])
    assert made and all(picture.size == (64, 64) and len(picture.getcolors(4096)) > 100 for picture in made.values())
    if name == "asyncdiff_compare":
        stock, routed = made["asyncdiff_compare/ksampler"], made["asyncdiff_compare/asyncdiff"]
        assert ImageChops.difference(stock, routed).getbbox() is None
        (report,) = {text for output in history["outputs"].values() for text in output.get("text", [])}
        assert report.startswith("Plan: 2 segments")


def without_files(prompt, infos, family):
    """What a workflow has between its files and what it samples, with a small network and its inputs where files are needed."""
    graph = {"small": {"class_type": "AsyncDiffTestDenoiser", "inputs": {"name": family}}}
    outputs = infos["AsyncDiffTestDenoiser"]["output"]

    def keep(key):
        graph[key] = prompt[key]
        inputs = prompt[key]["inputs"]
        for name, (source, slot) in [(name, value) for name, value in inputs.items() if isinstance(value, list)]:
            kind, used = prompt[source]["class_type"], prompt[source]["inputs"]
            if kind.endswith(("Loader", "LoaderSimple")) or used.keys() & {"clip", "vae", "audio_vae"}:
                last = kind == "LTXVEmptyLatentAudio"
                inputs[name] = ["small", 3 if last else outputs.index(infos[kind]["output"][slot])]
            else:
                keep(source)

    (sampler,) = (key for key, node in prompt.items() if node["class_type"] in ("AsyncDiffKSampler", "SamplerCustomAdvanced"))
    keep(sampler)
    return graph, sampler


def stock(graph):
    """The same as ComfyUI alone samples it, beside it."""
    found = {}
    for key, node in graph.items():
        if node["class_type"] in ("AsyncDiffOptions", "AsyncDiffModel", "AsyncDiffTestDenoiser"):
            continue
        inputs = {name: value for name, value in node["inputs"].items() if name != "options"}
        for name, value in inputs.items():
            if isinstance(value, list) and graph[value[0]]["class_type"] == "AsyncDiffModel":
                value = graph[value[0]]["inputs"]["model"]
            if isinstance(value, list):
                inputs[name] = value if value[0] == "small" else [f"stock {value[0]}", value[1]]
        kind = "KSampler" if node["class_type"] == "AsyncDiffKSampler" else node["class_type"]
        found[f"stock {key}"] = {"class_type": kind, "inputs": inputs}
    return found


def test_every_workflow_is_run():
    assert {parameter.values[0] for parameter in RUN} | FAMILIES.keys() == WORKFLOWS.keys() - {DEMO, "asyncdiff_sdxl_refiner"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in FAMILIES])
def test_its_graph_is_exact_on_two_ranks_with_a_small_network(frontend, server, infos, name):
    from helpers.denoisers import DENOISERS  # as late as the host, which it imports

    if FAMILIES[name] not in DENOISERS:
        pytest.skip("this ComfyUI does not know the network")
    needs_its_nodes(server, name)
    frontend.load(WORKFLOWS[name])
    prompt = frontend.prompt()
    for node in prompt.values():
        node["inputs"].update({key: value for key, value in SMALL.items() if key in node["inputs"]})
        if node["class_type"] == "AsyncDiffOptions":
            node["inputs"].update(devices="cpu, cpu", preset="Exact")
    graph, sampler = without_files(prompt, infos, FAMILIES[name])
    graph |= stock(graph)
    for key in (sampler, f"stock {sampler}"):
        graph[f"save {key}"] = {"class_type": "AsyncDiffTestSave", "inputs": {"latent": [key, 0], "name": f"{name} {key}"}}
    frontend.page.evaluate(EVENTS)
    history = server.wait(accepted(server, graph, frontend.page.evaluate("app.api.clientId")))
    assert history["status"]["status_str"] == "success", history["status"]
    frontend.page.wait_for_function("lines.length > 0")
    (line,) = frontend.page.evaluate("lines")
    assert line.startswith("AsyncDiff: 2 segments on cpu, cpu")
    found, expected = (
        load_file(server.base / "output" / f"{name} {key}.safetensors")["samples"] for key in (sampler, f"stock {sampler}")
    )
    assert torch.equal(found, expected) and found.isfinite().all() and found.unique().numel() > 100


def test_a_picture_brings_its_graph_back(frontend, server):
    demo = read(DEMO)
    (sampler,) = (node for node in demo["nodes"] if node["type"] == "AsyncDiffKSampler")
    sampler["widgets_values"][2] = SMALL["steps"]
    frontend.load(demo)
    before = frontend.serialize()
    frontend.page.evaluate(EVENTS)
    history = frontend.run()
    assert history["status"]["status_str"] == "success", history["status"]
    # the page may hear of the end before it hears of this
    frontend.page.wait_for_function("lines.some(line => line.startsWith('AsyncDiff: 2 segments on cpu, cpu'))")
    (picture,) = pictures(server, history["outputs"]).values()
    frontend.load(WORKFLOWS["asyncdiff_sd15"])
    content = base64.b64encode(Path(picture.filename).read_bytes()).decode()
    frontend.page.evaluate(
        """async content => {
          const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
          await app.handleFile(new File([bytes], "picture.png", { type: "image/png" }));
        }""",
        content,
    )
    after = frontend.serialize()
    assert after["links"] == before["links"]
    kept = ("id", "type", "title", "pos", "widgets_values")
    assert [[node.get(key) for key in kept] for node in after["nodes"]] == [
        [node.get(key) for key in kept] for node in before["nodes"]
    ]


@each
def test_it_is_a_template_with_a_thumbnail(server, name):
    assert name in server.get("/workflow_templates")[PACK_FOLDER]
    with urllib.request.urlopen(f"{server.url}/api/workflow_templates/{PACK_FOLDER}/{name}.jpg") as answer:
        content = answer.read()
    assert len(content) < 60_000
    assert Image.open(io.BytesIO(content)).size == (512, 512)


def test_the_template_browser_shows_and_loads_them(frontend):
    page = frontend.page
    frontend.execute("Comfy.BrowseTemplates")
    page.get_by_text(PACK_FOLDER, exact=True).click()
    for name in WORKFLOWS:
        card = page.get_by_test_id(f"template-workflow-{name}")
        card.scroll_into_view_if_needed()
        card.locator("img").wait_for()
        page.wait_for_function("image => image.naturalWidth === 512", arg=card.locator("img").element_handle())
    page.get_by_test_id("template-workflow-asyncdiff_inpaint").click()
    page.wait_for_function("app.graph.nodes.some(node => node.type === 'InpaintModelConditioning')")
    assert frontend.serialize()["links"] == read("asyncdiff_inpaint")["links"]
