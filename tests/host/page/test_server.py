"""A real ComfyUI with the pack in a folder whose path has spaces: over HTTP and its websocket, as a page sees it."""

from __future__ import annotations

import io
import itertools
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from asyncdiff_nodes.cli.comfyui import PACK, Server, failure
from helpers.serving import (
    PREVIEW,
    SEEDS,
    Graph,
    Page,
    assert_exact,
    graph,
    node,
    options,
    routed_only,
    sampler,
    saved,
    seconds_until_gone,
    twins,
)

COMFYUI = Path(os.environ["ASYNCDIFF_HOST_UNDER_TEST"])
TEST_PACK = Path(__file__).parents[1] / "pack"
FOLDER = "Async Diff (dev)"
NODES = {
    "AsyncDiffKSampler",
    "AsyncDiffKSamplerAdvanced",
    "AsyncDiffModel",
    "AsyncDiffOptions",
    "AsyncDiffReport",
    "AsyncDiffCompare",
    "AsyncDiffDemoLoader",
    "AsyncDiffDemoTextEncode",
}
FLAGS = ["--cpu", "--preview-method", "latent2rgb", "--use-pytorch-cross-attention"]
LIMITS = ("default", "min", "max", "step", "round", "control_after_generate")


def start(base: Path, packs: dict[str, Path]) -> Server:
    """A server that sees no GPU."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CUDA_VISIBLE_DEVICES", "")
        return Server(COMFYUI, sys.executable, base, packs, FLAGS)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    base = tmp_path_factory.mktemp("server") / "My ComfyUI files"
    with start(base, {FOLDER: PACK, "asyncdiff tests": TEST_PACK}) as server:
        yield Page(server)


@pytest.fixture(scope="module")
def infos(page):
    return page.server.get("/object_info")


def imported(server: Server, folder: str) -> float:
    """Seconds that the host took to import a pack, which has to succeed."""
    for trouble in ("Error while calling comfy_entrypoint", f"IMPORT FAILED: {folder}", "IMPORT FAILED): "):
        assert trouble not in server.log
    return float(re.search(rf"([\d.]+) seconds: .*/{re.escape(folder)}$", server.log, re.MULTILINE).group(1))


@pytest.mark.timing
def test_the_pack_loads_quickly_with_all_of_its_nodes(page, infos):
    assert set(infos) >= NODES
    assert {infos[name]["python_module"] for name in NODES} == {f"custom_nodes.{FOLDER}"}
    assert imported(page.server, FOLDER) < 0.5


def widgets(info: dict[str, Any], group: str = "required") -> list[tuple[str, str, Any, dict[str, Any]]]:
    """Name, type, choices and limits of each input, in order."""
    found = []
    for name in info["input_order"][group]:
        kind, *details = info["input"][group][name]
        detail = details[0] if details else {}
        choices = kind if isinstance(kind, list) else detail.get("options")
        limits = {key: value for key, value in detail.items() if key in LIMITS}
        found.append((name, "COMBO" if choices is not None else kind, choices, limits))
    return found


@pytest.mark.parametrize("name", ["KSampler", "KSamplerAdvanced"])
def test_the_samplers_have_the_hosts_inputs_and_outputs_then_options(infos, name):
    stock, own = infos[name], infos[f"AsyncDiff{name}"]
    assert widgets(own) == widgets(stock)
    assert "optional" not in stock["input_order"] or not stock["input_order"]["optional"]
    assert own["input_order"]["optional"] == ["options"]
    assert own["input"]["optional"]["options"][0] == "ASYNCDIFF_OPTIONS"
    for key in ("output", "output_name", "output_is_list"):
        assert list(own[key]) == list(stock[key]), key


@pytest.mark.parametrize("kind", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_ksampler_and_its_twin_give_identical_latents(page, kind):
    assert_exact(page, twins(kind))


@pytest.mark.parametrize("kind", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_ksampler_advanced_and_its_twin_in_two_stages_give_identical_latents(page, kind):
    seed = next(SEEDS)
    first = {"add_noise": "enable", "start_at_step": 0, "end_at_step": 3, "return_with_leftover_noise": "enable"}
    second = {"add_noise": "disable", "start_at_step": 3, "end_at_step": 10000, "return_with_leftover_noise": "disable"}
    linked = {"options": ["options", 0]}
    stages = {
        "plain_first": sampler("KSamplerAdvanced", seed, 6, **first),
        "plain": sampler("KSamplerAdvanced", seed, 6, **{**second, "latent_image": ["plain_first", 0]}),
        "routed_first": sampler("AsyncDiffKSamplerAdvanced", seed, 6, **first, **linked),
        "routed": sampler("AsyncDiffKSamplerAdvanced", seed, 6, **{**second, **linked, "latent_image": ["routed_first", 0]}),
    }
    assert_exact(page, saved(graph(kind, **stages)), ranked=("routed_first", "routed"))


def test_a_prompt_of_a_version_without_the_later_options_runs(page):
    """As a program has saved it, which knows no defaults."""
    nodes, then = twins(), ("preset", "devices", "segments", "stride", "warmup", "time_shift", "forecast", "cuts")
    nodes["options"]["inputs"] = {name: value for name, value in nodes["options"]["inputs"].items() if name in then}
    assert_exact(page, nodes)


def test_other_samplers_on_the_model_node_give_identical_latents(page):
    def custom(name: str, model: str) -> Graph:
        guider = node("CFGGuider", model=[model, 0], positive=["source", 1], negative=["source", 2], cfg=5.0)
        links = {"noise": ["noise", 0], "sampler": ["euler", 0], "sigmas": ["sigmas", 0], "latent_image": ["latent", 0]}
        return {f"guider_{name}": guider, name: node("SamplerCustomAdvanced", guider=[f"guider_{name}", 0], **links)}

    shared = {
        "attached": node("AsyncDiffModel", model=["source", 0], options=["options", 0]),
        "noise": node("RandomNoise", noise_seed=next(SEEDS)),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("BasicScheduler", model=["source", 0], scheduler="sgm_uniform", steps=4, denoise=1.0),
    }
    assert_exact(page, saved(graph(**shared, **custom("plain", "source"), **custom("routed", "attached"))))


def test_the_page_sees_every_step_a_preview_and_the_line_on_the_node(page):
    run = page.run(routed_only(steps=6, chosen=options("Custom", segments=2)))
    assert run.done, run.history["status"]
    assert [(data["value"], data["max"]) for data in run.of("progress", "routed")] == [(step, 6) for step in range(1, 7)]
    states = [data["nodes"]["routed"] for data in run.of("progress_state") if "routed" in data["nodes"]]
    assert {state["value"] for state in states if state["max"] == 6} == set(range(1, 7))
    assert (states[-1]["state"], states[-1]["value"]) == ("finished", 6)
    previews = [Image.open(io.BytesIO(data[4:])) for data in run.of(PREVIEW)]
    assert len(previews) == 6
    assert all(preview.width == preview.height and len(preview.getcolors(1 << 20)) > 20 for preview in previews)
    ((name, text),) = run.texts
    assert name == "routed" and re.match(r"AsyncDiff: 2 segments on cpu, cpu( · \d+\.\d\dx)?$", text), text


def test_prompts_with_another_seed_or_lora_strength_use_the_same_processes(page):
    latents = [assert_exact(page, twins())]
    before = set(page.ranks())
    assert len(before) >= 2
    latents.append(assert_exact(page, twins()))
    for strength in (0.8, 0.3):
        lora = node("AsyncDiffTestLora", model=["source", 0], strength=strength)
        latents.append(assert_exact(page, twins(model="lora", lora=lora)))
    latents.append(assert_exact(page, twins()))
    assert set(page.ranks()) == before
    assert all(not torch.equal(first, second) for first, second in itertools.combinations(latents, 2))


@pytest.mark.timing
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 6])  # in the warm-up and after it
def test_interrupt_answers_at_once_and_the_next_prompt_is_right(page, step):
    assert_exact(page, twins())
    before = set(page.ranks())
    pressed = []

    def interrupt(start: int) -> None:
        page.wait_for(lambda kind, data: kind == "progress" and data["node"] == "routed" and data["value"] >= step, start)
        time.sleep(0.05)
        pressed.append(time.time())
        page.server.post("/interrupt", {})

    run = page.run(routed_only(pixels=384, steps=60, chosen=options("Custom", segments=2)), meanwhile=interrupt)
    (interrupted,) = run.of("execution_interrupted")
    # the host's own time: it collects garbage next, and no event leaves it meanwhile
    assert interrupted["timestamp"] / 1000 - pressed[0] < 0.5
    assert not run.done and not run.of("execution_error")
    assert interrupted["node_id"] == "routed"
    assert len(run.of("progress", "routed")) < 60
    assert_exact(page, twins())
    assert set(page.ranks()) == before


def test_free_ends_the_ranks_of_an_idle_server(page):
    assert_exact(page, twins())
    ranks = page.ranks()
    assert len(ranks) >= 2
    page.server.post("/free", {"unload_models": True, "free_memory": True})
    seconds_until_gone(ranks, limit=5.0)
    assert not page.ranks()
    assert_exact(page, twins())
    assert len(page.ranks()) == 2


BAD = [
    (options(devices="cpu,cuda:9"), "cuda:9"),
    (options("Custom", segments=3), "segments=3"),
    (options("Custom", stride=2), "stride=2"),
    (options(cuts="input_blocks.99,output_blocks.3"), "input_blocks.99"),
]


@pytest.mark.parametrize(("bad", "named"), BAD, ids=[named for _, named in BAD])
def test_an_option_that_cannot_be_fails_with_its_name_and_the_queue_goes_on(page, infos, bad, named):
    run = page.run(routed_only(chosen=bad))
    assert not run.done
    where = "KSampler (AsyncDiff) (node routed): " if bad["inputs"]["cuts"] else "AsyncDiff Options (node options): "
    assert failure(run.history, infos) == where + run.error["exception_message"].strip()
    assert named in run.error["exception_message"]
    assert run.error["node_type"] == ("AsyncDiffKSampler" if bad["inputs"]["cuts"] else "AsyncDiffOptions")
    assert page.run(routed_only()).done


def test_an_unknown_preset_is_refused(page):
    """When it is queued, or by our node where the host leaves that to it (0.3.64)."""
    prompt, host = routed_only(chosen=options("Ludicrous")), page.server.get("/system_stats")["system"]["comfyui_version"]
    if tuple(map(int, host.split("."))) < (0, 29):
        run = page.run(prompt)
        assert not run.done and "preset='Ludicrous': choose one of" in str(run.history["status"])
    else:
        with pytest.raises(ValueError, match="preset") as refused:
            page.server.queue(prompt)
        assert "Ludicrous" in str(refused.value) and "value_not_in_list" in str(refused.value)
    assert page.run(routed_only()).done


@pytest.mark.parametrize("way", ["no options", "auto", "one named", "model node"])
def test_without_a_second_device_the_host_samples_and_says_why(page, way):
    """One line in the log and one on the node; the latent is KSampler's."""
    prompt = twins()
    if way == "no options":
        del prompt["routed"]["inputs"]["options"]
    elif way == "auto":
        prompt["options"] = options("Balanced", "auto")
    elif way == "one named":
        prompt["options"] = options("Balanced", "cpu")
    else:
        prompt["attached"] = node("AsyncDiffModel", model=["source", 0])
        prompt["routed"] = {**prompt["plain"], "inputs": {**prompt["plain"]["inputs"], "model": ["attached", 0]}}
    why = "devices='cpu' names only one device" if way == "one named" else "ComfyUI uses no GPU that ranks could use"
    before = set(page.ranks())
    run = page.run(prompt)
    assert run.done, run.history["status"]
    assert torch.equal(page.samples("plain"), page.samples("routed"))
    ((name, text),) = run.texts
    assert name == "routed" and text.startswith(f"AsyncDiff: ComfyUI sampled as usual: {why}"), text
    lines = [line for line in run.log.splitlines() if "AsyncDiff" in line]
    assert len(lines) == 1 and why in lines[0], lines
    assert set(page.ranks()) == before


def test_the_report_is_text_and_a_picture(page):
    report = node("AsyncDiffReport", latent=["routed", 0])
    picture = node("SaveImage", images=["report", 1], filename_prefix="timeline")
    run = page.run(routed_only(steps=8, chosen=options("Custom", segments=2), report=report, picture=picture))
    assert run.done, run.history["status"]
    (text,) = run.history["outputs"]["report"]["text"]
    for part in (
        "Plan: 2 segments, stride 1, warm-up 3",
        "Calls: 8 on 1 stream",
        "1 to 3 (warm-up), 7 to 8 (cool-down)",
        "Rank 0 on cpu",
        "Rank 1 on cpu",
        "Drift",
    ):
        assert part in text, text
    (image,) = run.history["outputs"]["picture"]["images"]
    with Image.open(page.server.base / "output" / image["subfolder"] / image["filename"]) as timeline:
        assert timeline.mode == "RGB" and timeline.width > 600 and timeline.height > 150
        assert len(timeline.getcolors(1 << 20)) > 20


@pytest.mark.timing
@pytest.mark.slow
def test_a_copy_under_another_name_works_and_a_killed_server_leaves_no_rank(tmp_path):
    """As cloned, or unpacked from an archive."""
    name = "ComfyUI_AsyncDiff-main"
    copy = tmp_path / "custom_nodes" / name
    shutil.copytree(PACK / "asyncdiff_nodes", copy / "asyncdiff_nodes", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PACK / "__init__.py", copy)
    if (PACK / "js").exists():
        shutil.copytree(PACK / "js", copy / "js")
    with start(tmp_path, {"asyncdiff_tests": TEST_PACK}) as server:
        infos = server.get("/object_info")
        assert set(infos) >= NODES
        assert {infos[node]["python_module"] for node in NODES} == {f"custom_nodes.{name}"}
        assert imported(server, name) < 0.5
        page = Page(server)
        assert_exact(page, twins())
        ranks = page.ranks()
        assert len(ranks) == 2
        server.process.send_signal(signal.SIGKILL)
        seconds_until_gone(ranks, limit=5.0)


def test_a_terminated_server_leaves_no_rank(page):
    """The last test with this server."""
    assert_exact(page, twins())
    ranks = page.ranks()
    assert len(ranks) >= 2
    page.server.process.send_signal(signal.SIGTERM)
    seconds_until_gone(ranks, limit=5.0)
    page.server.process.wait(20)
