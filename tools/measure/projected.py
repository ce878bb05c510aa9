"""Project whole runs of true-size networks on given devices and links, and write docs/data/projected.json.

python tools/measure/projected.py [FILE]

Nothing is timed here. Counted, on the meta device, in float16: the work of each block, what segments send each other, what calls
in bands exchange and how often. Given: how long one device takes, by the paper's figures (:data:`SECONDS`), and the links
(:data:`LINKS`). The engine's clock plays the runs through, and *Balanced* chooses as in ComfyUI. It takes two minutes. Then
python tools/measure/tables.py for the pages that show it.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from asyncdiff_nodes.cli.example_calls import example_call
from asyncdiff_nodes.cli.report import write_json
from asyncdiff_nodes.cli.zoo import find_model
from asyncdiff_nodes.engine import BlockGraph, Plan, family_of, place, trace
from asyncdiff_nodes.engine.planning.bands import find_bands
from asyncdiff_nodes.engine.planning.clock import simulate
from asyncdiff_nodes.engine.planning.run_times import Costs, Link
from asyncdiff_nodes.host.choices import PRESETS, STALE_COSTS

FILE = Path(__file__).resolve().parents[2] / "docs" / "data" / "projected.json"
# network -> latent pixels a side
SIZES = {"sd15": 64, "sdxl": 128, "flux": 128}
# seconds of one step with CFG, on an A5000: a fiftieth of the paper's sequential run (arXiv 2406.06911, Table 1)
SECONDS = {"sd15": 2.70 / 50, "sdxl": 13.81 / 50}
# bytes per second and seconds of latency; direct ones begin to carry an asynchronous call's values at its end
LINKS = {
    "NVLink": Link(20e-6, 50e9, direct=True),
    "PCIe with P2P": Link(30e-6, 20e9, direct=True),
    "PCIe without P2P": Link(100e-6, 5e9),
    "Ethernet": Link(200e-6, 1e9),
}
DEVICES = (2, 3, 4, 8)
STEPS = (4, 8, 20, 50)
CFGS = (1, 7)


@dataclass(frozen=True)
class Network:
    """What is counted of a network, for one prompt, and how long it takes.

    Attributes:
        exchanges: devices -> how often a rank waits for others in a call in bands, and what all of them send.
        per_mac: seconds.
    """

    name: str
    graph: BlockGraph
    exchanges: dict[int, tuple[int, int]]
    per_mac: float

    @classmethod
    def of(cls, name: str) -> Network:
        """Count it."""
        skeleton = find_model(name).skeleton(torch.float16)
        args, kwargs = example_call(skeleton, SIZES[name], batch=1)
        family = family_of(skeleton, args, kwargs)
        exchanges = {}
        for devices in DEVICES:
            bands = find_bands(skeleton, family, args, kwargs, devices)
            waits = sum(length is not None for scope in bands.scopes.values() for length in scope.exchanges)
            exchanges[devices] = waits, bands.bytes_per_call
        return cls(name, trace(skeleton, family, args, kwargs), exchanges, _seconds_per_mac(name))

    def costs(self, devices: int, link: Link) -> Costs:
        """Seconds of a call's parts, on so many devices of a branch."""
        blocks = tuple(block.macs * self.per_mac for block in self.graph.blocks)
        glue = self.graph.glue_macs * self.per_mac
        if devices == 1:
            return Costs(blocks, glue, link=link)
        waits, sent = self.exchanges[devices]
        in_bands = sum(blocks) / devices + glue + waits * link.latency + sent / devices / link.bandwidth
        return Costs(blocks, glue, in_bands, link)


def _seconds_per_mac(name: str) -> float:
    """Of a network with a published time; others are taken to be as efficient as SDXL."""
    published = name if name in SECONDS else "sdxl"
    skeleton = find_model(published).skeleton(torch.float16)
    args, kwargs = example_call(skeleton, SIZES[published], batch=2)
    graph = trace(skeleton, family_of(skeleton, args, kwargs), args, kwargs)
    return SECONDS[published] / (sum(block.macs for block in graph.blocks) + graph.glue_macs)


def runs(network: Network, devices: int, cfg: int, link: Link, steps: int) -> dict[str, float]:
    """Seconds of a whole run by plan, in words; with CFG and an even number of devices each half has its own of them."""
    branches = 2 if cfg > 1 and devices % 2 == 0 else 1
    prompts = 2 // branches if cfg > 1 else 1  # that a device computes one after the other
    each = devices // branches
    costs = network.costs(each, link)
    if each == 1:
        return {"branches": steps * costs.unrouted}
    preset = PRESETS["Balanced"]
    ahead = Plan(each, warmup=preset.warmup, cooldown=preset.cooldown)
    in_bands = replace(ahead, bands=each)
    per_second = link.bandwidth * network.per_mac  # in the unit of the costs by which blocks are placed, MACs
    placement = place(network.graph, ahead, bandwidth=per_second)
    found = {"bands": steps * costs.bands}
    for words, plan in (("ahead, begun in bands", in_bands), ("ahead", ahead)):
        found[words] = simulate(placement, plan, steps, costs).seconds
    return {words: prompts * seconds for words, seconds in found.items()}


def chosen(found: dict[str, float]) -> str:
    """What *Balanced* takes of these; see :mod:`asyncdiff_nodes.host.routing.band_choice`."""
    best = min((words for words in found if words not in {"one device", "bands"}), key=lambda words: found[words])
    usual, _ = STALE_COSTS["Balanced"]
    if found.get("bands", math.inf) <= min(usual * found[best], found["one device"]):
        best = "bands"
    return best if found[best] < found["one device"] else "one device"


def rows() -> Iterator[dict[str, Any]]:
    """One of each plan of each run."""
    for network in map(Network.of, SIZES):
        for devices, cfg, (link, facts), steps in itertools.product(DEVICES, CFGS, LINKS.items(), STEPS):
            alone = steps * (2 if cfg > 1 else 1) * network.costs(1, facts).unrouted
            found = {"one device": alone, **runs(network, devices, cfg, facts, steps)}
            for words, seconds in found.items():
                yield {
                    "network": network.name,
                    "size": 8 * SIZES[network.name],
                    "devices": devices,
                    "cfg": cfg,
                    "link": link,
                    "steps": steps,
                    "plan": words,
                    "seconds": seconds,
                    "run_speedup": alone / seconds,
                    "chosen": words == chosen(found),
                }


def main() -> None:
    """Write the rows."""
    parser = argparse.ArgumentParser(description="Project whole runs on given devices and links.")
    parser.add_argument("file", nargs="?", type=Path, default=FILE)
    links = {name: {"latency_s": link.latency, "bytes_per_s": link.bandwidth} for name, link in LINKS.items()}
    result = {"seconds_per_step_with_cfg": SECONDS, "links": links, "rows": list(rows())}
    write_json(str(parser.parse_args().file), result, "python tools/measure/projected.py")


if __name__ == "__main__":
    main()
