"""A real ComfyUI with the pack in a folder whose path has spaces: over HTTP and its websocket, as a page sees it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from asyncdiff_nodes.cli.comfyui import PACK, Server

COMFYUI = Path(os.environ["ASYNCDIFF_HOST_UNDER_TEST"])
TEST_PACK = Path(__file__).parent / "pack"
FOLDER = "Async Diff (dev)"
NODES = {
    "AsyncDiffKSampler",
    "AsyncDiffKSamplerAdvanced",
    "AsyncDiffModel",
    "AsyncDiffOptions",
    "AsyncDiffReport",
    "AsyncDiffDemoLoader",
    "AsyncDiffDemoTextEncode",
}
FLAGS = ["--cpu", "--preview-method", "latent2rgb", "--use-pytorch-cross-attention"]
LIMITS = ("default", "min", "max", "step", "round", "control_after_generate")
PREVIEW, TEXT = 1, 3  # types of binary events
SEEDS = itertools.count(100)  # a new one for every sampling: the host keeps the outputs of nodes that did not change

Graph = dict[str, dict[str, Any]]


@dataclass
class Run:
    """One prompt that has ended.

    Attributes:
        events: (time, name or number of a binary type, content), from queueing to the end.
        log: what the server printed meanwhile.
    """

    history: dict[str, Any]
    events: list[tuple[float, str | int, Any]]
    log: str

    def of(self, kind: str | int, node: str | None = None) -> list[Any]:
        """Contents of the events of one kind, of one node."""
        return [data for _, found, data in self.events if found == kind and (node is None or data.get("node") == node)]

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Node id and progress text."""
        found = []
        for data in self.of(TEXT):
            end = 4 + struct.unpack(">I", data[:4])[0]
            found.append((data[4:end].decode(), data[end:].decode()))
        return found

    @property
    def done(self) -> bool:
        return self.history["status"]["completed"]

    @property
    def error(self) -> dict[str, Any]:
        """The message of ``execution_error``."""
        return self.of("execution_error")[0]


class Page:
    """What the browser is to the server: one websocket, all events of which are kept."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.events: list[tuple[float, str | int, Any]] = []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._listen()), daemon=True)
        self._thread.start()
        self.wait_for(lambda kind, _: kind == "status")

    async def _listen(self) -> None:
        url = f"{self.server.url}/ws?clientId=asyncdiff"
        async with aiohttp.ClientSession() as session, session.ws_connect(url, max_msg_size=0) as socket:
            async for message in socket:
                if message.type == aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    self.events.append((time.monotonic(), event["type"], event["data"]))
                elif message.type == aiohttp.WSMsgType.BINARY:
                    self.events.append((time.monotonic(), struct.unpack(">I", message.data[:4])[0], message.data[4:]))

    def wait_for(self, wanted: Callable[[str | int, Any], bool], start: int = 0, seconds: float = 120.0) -> float:
        """When the first event from number ``start`` on came that is wanted."""
        deadline = time.monotonic() + seconds
        for index in itertools.count(start):
            while index >= len(self.events):
                assert time.monotonic() < deadline, f"no such event; the log ends with:\n{self.server.log[-3000:]}"
                time.sleep(0.002)
            when, kind, data = self.events[index]
            if wanted(kind, data):
                return when
        raise AssertionError

    def run(self, graph: Graph, meanwhile: Callable[[int], None] | None = None) -> Run:
        """Queue ``graph`` and wait for its end; ``meanwhile`` is given the number of its first event."""
        start, printed = len(self.events), len(self.server.log)
        prompt = self.server.queue(graph)
        if meanwhile is not None:
            meanwhile(start)
        self.wait_for(lambda kind, data: kind == "executing" and data["node"] is None and data["prompt_id"] == prompt, start)
        history = self.server.wait(prompt)
        return Run(history, self.events[start:], self.server.log[printed:])

    def ranks(self) -> dict[int, psutil.Process]:
        """The rank processes of the server."""
        found = {}
        for child in psutil.Process(self.server.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # just ended
                if "spawn_main" in " ".join(child.cmdline()):
                    found[child.pid] = child
        return found

    def samples(self, name: str) -> torch.Tensor:
        """What AsyncDiffTestSave saved."""
        return load_file(self.server.base / "output" / f"{name}.safetensors")["samples"]


def node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def options(preset: str = "Exact", devices: str = "cpu,cpu", **changes: Any) -> dict[str, Any]:
    rest = {"segments": 0, "stride": 1, "warmup": 3, "time_shift": False, "forecast": True, "cuts": "", **changes}
    return node("AsyncDiffOptions", preset=preset, devices=devices, **rest)


def sampler(class_type: str, seed: int, steps: int = 4, model: str = "source", **changes: Any) -> dict[str, Any]:
    """KSampler, or with ``options=["options", 0]`` its twin."""
    common = {"steps": steps, "cfg": 7.0, "sampler_name": "dpmpp_2m", "scheduler": "karras", "latent_image": ["latent", 0]}
    prompts = {"positive": ["source", 1], "negative": ["source", 2]}
    name = "noise_seed" if class_type.endswith("Advanced") else "seed"
    denoise = {} if class_type.endswith("Advanced") else {"denoise": 1.0}
    return node(class_type, **{"model": [model, 0], name: seed, **common, **denoise, **prompts, **changes})


def graph(kind: str = "sd15", pixels: int = 128, **nodes: dict[str, Any]) -> Graph:
    """Model, latent and options for ``nodes``."""
    return {
        "source": node("AsyncDiffTestModel", kind=kind, seed=7),
        "latent": node("EmptyLatentImage", width=pixels, height=pixels, batch_size=1),
        "options": options(),
        **nodes,
    }


def routed_only(pixels: int = 128, steps: int = 4, chosen: dict[str, Any] | None = None, **nodes: dict[str, Any]) -> Graph:
    """One AsyncDiffKSampler."""
    routed = sampler("AsyncDiffKSampler", next(SEEDS), steps, options=["options", 0])
    save = node("AsyncDiffTestSave", latent=["routed", 0], name="routed")
    return graph(pixels=pixels, routed=routed, save=save, options=chosen or options(), **nodes)


def twins(kind: str = "sd15", model: str = "source", **nodes: dict[str, Any]) -> Graph:
    """KSampler and AsyncDiffKSampler on the same things."""
    seed = next(SEEDS)
    return saved(
        graph(
            kind,
            plain=sampler("KSampler", seed, model=model),
            routed=sampler("AsyncDiffKSampler", seed, model=model, options=["options", 0]),
            **nodes,
        )
    )


def saved(nodes: Graph) -> Graph:
    """With the latents of ``plain`` and ``routed`` saved."""
    saves = {f"save_{name}": node("AsyncDiffTestSave", latent=[name, 0], name=name) for name in ("plain", "routed")}
    return {**nodes, **saves}


def assert_exact(page: Page, nodes: Graph, ranked: tuple[str, ...] = ("routed",)) -> torch.Tensor:
    """The two saved latents are bit-identical, and the nodes ``ranked`` were computed by two ranks."""
    run = page.run(nodes)
    assert run.done, run.history["status"]
    assert {name for name, text in run.texts if text.startswith("AsyncDiff: 2 segments on cpu, cpu")} == set(ranked)
    plain, routed = page.samples("plain"), page.samples("routed")
    assert plain.isfinite().all() and plain.std() > 0.01
    assert torch.equal(plain, routed)
    return routed


def alive(processes: dict[int, psutil.Process]) -> list[int]:
    """Those of them that still run."""
    found = []
    for pid, process in processes.items():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(pid)
    return found


def seconds_until_gone(processes: dict[int, psutil.Process], limit: float) -> float:
    """How long they take to end."""
    began = time.monotonic()
    while left := alive(processes):
        assert time.monotonic() - began < limit, f"{left} of {list(processes)} still run after {limit} s"
        time.sleep(0.02)
    return time.monotonic() - began


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


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_ksampler_and_its_twin_give_identical_latents(page, kind):
    assert_exact(page, twins(kind))


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
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
    run = page.run(routed_only(steps=6, chosen=options("Balanced")))
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


@pytest.mark.parametrize("step", [1, 6])  # in the warm-up and after it
def test_interrupt_answers_at_once_and_the_next_prompt_is_right(page, step):
    assert_exact(page, twins())
    before = set(page.ranks())
    pressed = []

    def interrupt(start: int) -> None:
        page.wait_for(lambda kind, data: kind == "progress" and data["node"] == "routed" and data["value"] >= step, start)
        time.sleep(0.05)
        pressed.append(time.time())
        page.server.post("/interrupt", {})

    run = page.run(routed_only(pixels=384, steps=60, chosen=options("Balanced")), meanwhile=interrupt)
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
def test_an_option_that_cannot_be_fails_with_its_name_and_the_queue_goes_on(page, bad, named):
    run = page.run(routed_only(chosen=bad))
    assert not run.done
    assert named in run.error["exception_message"]
    assert run.error["node_type"] == ("AsyncDiffKSampler" if bad["inputs"]["cuts"] else "AsyncDiffOptions")
    assert page.run(routed_only()).done


def test_an_unknown_preset_is_refused_when_it_is_queued(page):
    with pytest.raises(ValueError, match="preset") as refused:
        page.server.queue(routed_only(chosen=options("Turbo")))
    assert "Turbo" in str(refused.value) and "value_not_in_list" in str(refused.value)
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
    why = "devices='cpu' names only one device" if way == "one named" else "this machine has no CUDA device"
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
    run = page.run(routed_only(steps=8, chosen=options("Balanced"), report=report, picture=picture))
    assert run.done, run.history["status"]
    (text,) = run.history["outputs"]["report"]["text"]
    for part in ("Plan: 2 segments, stride 1, warm-up 3", "Calls: 8 on 1 stream", "Rank 0 on cpu", "Rank 1 on cpu", "Drift"):
        assert part in text, text
    (image,) = run.history["outputs"]["picture"]["images"]
    with Image.open(page.server.base / "output" / image["subfolder"] / image["filename"]) as timeline:
        assert timeline.mode == "RGB" and timeline.width > 600 and timeline.height > 150
        assert len(timeline.getcolors(1 << 20)) > 20


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
