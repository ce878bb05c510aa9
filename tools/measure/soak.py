"""Queue thousands of small prompts in one ComfyUI, look at every picture, and write FILE, and beside it a graph of memory.

python tools/measure/soak.py [--prompts 2000] [--seed 1] [FILE]

Models, LoRA strengths, sizes, plans and seeds change from prompt to prompt, as drawn by a seed, and some prompts are cancelled.
A picture must be the one that the same settings gave before, bit for bit; where the plan is exact, that of KSampler.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import within_host

FLAGS = ["--cpu", "--preview-method", "none", "--use-pytorch-cross-attention"]
EVERY = 10  # prompts between two looks at the server
CUTS = "input_blocks.2, output_blocks.1"  # pictures depend on cuts, and these follow measured times otherwise
PLANS = {
    "exact": {"preset": "Exact"},
    "asynchronous": {"preset": "Custom", "segments": 2, "warmup": 1, "cuts": CUTS},
    "reuse": {"preset": "Custom", "segments": 2, "warmup": 1, "forecast": False, "cuts": CUTS},
    "stride": {"preset": "Custom", "devices": "cpu,cpu,cpu", "segments": 2, "stride": 2, "warmup": 1, "cuts": CUTS},
    "branches": {"preset": "Custom", "branches": 2},
}


@dataclass(frozen=True)
class Prompt:
    """What is asked for; ``model`` and ``seed`` are seeds, ``pixels`` a side, ``lora`` a strength."""

    plan: str = "exact"
    model: int = 7
    lora: float = 0.0
    pixels: int = 64
    seed: int = 1


def prompts(count: int, seed: int) -> Iterator[tuple[Prompt, float | None]]:
    """Each prompt, and the seconds after which it is cancelled. What takes a new group changes rarely, as in a queue."""
    rng, now = random.Random(seed), Prompt()
    for _ in range(count):
        if rng.random() < 0.06:
            now = replace(now, plan=rng.choice(list(PLANS)))
        if rng.random() < 0.03:
            now = replace(now, model=rng.choice((7, 8)))
        if rng.random() < 0.2:
            now = replace(now, lora=rng.choice((0.0, 0.5, 1.0)))
        if rng.random() < 0.25:
            now = replace(now, pixels=rng.choice((64, 96, 128)))
        now = replace(now, seed=now.seed % 3 + 1)  # never the last one: the host would have nothing to do
        yield now, rng.uniform(0.0, 0.6) if rng.random() < 0.05 else None


def main() -> None:
    """Have the host's Python queue them, and draw what became of its memory."""
    from asyncdiff_nodes.cli.report import write_json

    given = within_host.asked("Queue small prompts by the thousand.", "prompts", 2000, "soak.json")
    found = within_host.found_by(__file__, str(given.count), str(given.seed))
    states = found.pop("states")
    tenth = max(1, len(states) // 10)
    early, late = states[tenth : 2 * tenth], states[-tenth:]  # in the first tenth, memory is still being filled
    growth = {what: statistics.median(s[what] for s in late) - statistics.median(s[what] for s in early) for what in early[0]}
    memory = [round(state["memory"] / 2**20, 1) for state in states]
    result = {"seed": given.seed, **found, "growth": growth, "every": EVERY, "memory_mib": memory}
    write_json(given.file, result, f"python tools/measure/soak.py --prompts {given.count} --seed {given.seed}")
    draw(memory, Path(given.file).with_suffix(".png"))
    print(f"{found}\n{growth}\nwritten: {given.file}")


def draw(memory: list[float], file: Path) -> None:
    """Memory of ComfyUI's process over the prompts."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 2.5), layout="constrained")
    axes.plot([EVERY * (number + 1) for number in range(len(memory))], memory, linewidth=1)
    axes.set(xlabel="prompts", ylabel="MiB of ComfyUI's process", ylim=(0, None))
    figure.savefig(file, dpi=100)


def inside(file: str, count: int, seed: int) -> None:
    """Within the host's Python: the server, and what it made of each prompt."""
    import psutil

    from asyncdiff_nodes.cli.comfyui import PACK, Server, find_comfyui
    from helpers.serving import Page, alive, graph, node, options, sampler

    def nodes(prompt: Prompt, twin: bool) -> dict[str, Any]:
        lora = node("AsyncDiffTestLora", model=["source", 0], strength=prompt.lora)
        chosen = {"chosen": options(**PLANS[prompt.plan])}
        routed = sampler("AsyncDiffKSampler", prompt.seed, model="lora", options=["chosen", 0])
        found = {**graph(pixels=prompt.pixels), **chosen, "lora": lora, "routed": routed}
        found["source"]["inputs"]["seed"] = prompt.model
        found["save"] = node("AsyncDiffTestSave", latent=["routed", 0], name="routed")
        if twin:
            found["plain"] = sampler("KSampler", prompt.seed, model="lora")
            found["save_plain"] = node("AsyncDiffTestSave", latent=["plain", 0], name="plain")
        del found["options"]
        return found

    def digest(page: Page, name: str) -> str:
        return hashlib.sha256(page.samples(name).numpy().tobytes()).hexdigest()

    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    base, begin = Path(tempfile.mkdtemp(prefix="soak-")), time.monotonic()
    packs = {"ComfyUI-AsyncDiff": PACK, "asyncdiff tests": PACK / "tests" / "host" / "pack"}
    known: dict[Prompt, str] = {}
    told = {"prompts": 0, "pictures": 0, "cancelled": 0, "mismatches": 0, "failed": 0, "unrouted": 0}
    states = []
    with Server(find_comfyui(), sys.executable, base, packs, FLAGS) as server:
        page = Page(server)
        process = psutil.Process(server.process.pid)
        for prompt, cancel in prompts(count, seed):
            told["prompts"] += 1
            twin = prompt not in known and prompt.plan == "exact"
            timer = None if cancel is None else threading.Timer(cancel, server.post, ("/interrupt", {}))
            run = page.run(nodes(prompt, twin), meanwhile=timer and (lambda _, timer=timer: timer.start()))
            if timer is not None:
                timer.join()
            if run.done:
                told["pictures"] += 1
                told["unrouted"] += not any("AsyncDiff: 2 segments" in t or "AsyncDiff: 2 branches" in t for _, t in run.texts)
                told["mismatches"] += known.setdefault(prompt, digest(page, "plain" if twin else "routed")) != digest(
                    page, "routed"
                )
            else:
                told["cancelled" if run.of("execution_interrupted") else "failed"] += 1
            page.events.clear()
            if told["prompts"] % EVERY == 0:
                server.post("/history", {"clear": True})  # the host keeps all prompts there
                states.append(
                    {
                        "memory": process.memory_info().rss,
                        "descriptors": process.num_fds(),
                        "threads": process.num_threads(),
                        "processes": len(process.children(recursive=True)),
                    }
                )
                print(told, states[-1], flush=True)
        ranks = page.ranks()
    time.sleep(5)
    told |= {"settings": len(known), "orphans": len(alive(ranks)), "seconds": time.monotonic() - begin}
    Path(file).write_text(json.dumps({**told, "states": states}), encoding="utf-8")


if __name__ == "__main__":
    inside(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])) if sys.argv[1:2] == ["--inside"] else main()
