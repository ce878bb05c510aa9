"""A real ComfyUI over HTTP and its websocket, as a page sees it, and the graphs that tests give it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import psutil
import torch
from safetensors.torch import load_file

from asyncdiff_nodes.cli.comfyui import Server

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
    rest = {
        "segments": 0,
        "stride": 1,
        "warmup": 3,
        "time_shift": False,
        "forecast": True,
        "cuts": "",
        "cooldown": 1,
        "speedup": 0.0,
        "branches": 0,
        "control_nets": "shared",
        "on_failure": "restart",
        "compression": "none",
    }
    return node("AsyncDiffOptions", preset=preset, devices=devices, **rest | changes)


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
