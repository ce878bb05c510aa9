"""Measure calls in bands and whole runs on two CPU ranks beside other ways, and write docs/data/bands.json.

python tools/measure/bands.py [--only NETWORK] [--quick] [FILE]

Networks of true width with random weights, float32, CFG 1. Ranks, unrouted copies and the caller have one thread each, so two
cores must be idle, and 20 GiB of memory free. Contestants take turns, so that whatever else the machine does disturbs them alike.
It takes forty minutes: ``--only`` measures one network, and what FILE has of others stays. ``--quick`` takes narrow networks, to
see that all of it works. Then python tools/measure/tables.py for the page that shows it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from asyncdiff_nodes.cli.report import write_json
from asyncdiff_nodes.cli.subjects import even_cuts
from asyncdiff_nodes.cli.tables import MIB
from asyncdiff_nodes.cli.zoo import PUBLISHED_CUTS
from asyncdiff_nodes.engine import IdleWorkers, Plan, RankOptions, WorkerGroup, family_of, meta_copy, trace
from copies import Copy, copies_of, together
from true_width import NETWORKS, QUICK, UNET, Network, euler, times

FILE = Path(__file__).resolve().parents[2] / "docs" / "data" / "bands.json"
RANKS = 2
ROUNDS = 3
STEPS = (4, 8, 20)
BANDS = Plan(1, bands=RANKS)
BALANCED = Plan(RANKS, warmup=3, cooldown=1)
PUBLISHED = Plan(RANKS, forecast=0)
# in words, and whose it is if not ours
PLANS = (
    (BANDS, "bands", ""),
    (BALANCED, "segments", ""),
    (replace(BALANCED, bands=RANKS), "segments, synchronous calls in bands", ""),
    (PUBLISHED, "segments, as published", "AsyncDiff"),
)


@dataclass(frozen=True)
class Run:
    """A whole run: its plan, in words, and whose that is if not ours; its seconds, and the latent at the end."""

    steps: int
    plan: Plan
    words: str
    peer: str
    seconds: float
    latent: torch.Tensor


class Measuring:
    """One network: the processes that compute it by themselves, and what was found so far."""

    def __init__(self, network: Network, copies: Sequence[Copy], peers: Sequence[Copy], idle: IdleWorkers, rounds: int) -> None:
        self._network, self._copies, self._peers, self._idle, self._rounds = network, copies, peers, idle, rounds
        self._module = network.module()
        self._facts = {"network": network.name, "cfg": 1, "devices": RANKS, "link": "loopback"}
        self._blocks: list[float] = copies[0].ask("blocks", network.run)  # seconds of each
        self._unrouted: dict[int, list[float]] = {steps: [] for steps in STEPS}  # seconds of each step of these runs
        self._both: list[float] = []  # of a call of whole runs, two copies at once

    def all(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One row of calls, and one of each whole run."""
        for steps in STEPS:
            self._copies[0].ask("begin", self._network.run, steps)
        calls, runs = {}, list[Run]()
        for number, (plan, words, peer) in enumerate(PLANS, 1):
            with self._group(plan) as group:
                if plan is BANDS:
                    calls = self._calls(group)
                self._run(group, replace(plan, warmup=1, cooldown=0), 2)  # the first calls pay for the trace and for memory
                for steps in STEPS:
                    runs.append(Run(steps, plan, words, peer, *self._run(group, plan, steps)))
                    self._step_unrouted(steps, steps * number // len(PLANS))
                self._both.append(together(self._copies, "call", self._network.run))
        return calls, [row for steps in STEPS for row in self._rows(steps, runs)]

    def _step_unrouted(self, steps: int, until: int) -> None:
        """Take the unrouted run of so many steps further: a part of it comes after that of each plan."""
        done = self._unrouted[steps]
        while len(done) < until:
            done.append(self._copies[0].ask("step", steps))

    def _rows(self, steps: int, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Compare runs of so many steps with the unrouted one, which comes first."""
        each = list(itertools.chain(*self._unrouted.values()))
        scaling, alone = RANKS * statistics.median(each) / statistics.median(self._both), sum(self._unrouted[steps])
        latent = torch.from_numpy(self._copies[0].ask("latent", steps))
        unrouted = Run(steps, Plan(), "one device", "", alone, latent)
        return [
            {
                **self._facts,
                "size": self._network.words(self._network.run),
                "steps": steps,
                "plan": run.words,
                "bands": run.plan.bands,
                "peer": run.peer,
                "seconds": run.seconds,
                "run_speedup": alone / run.seconds,
                "scaling": scaling,
                "share_of_machine": alone / run.seconds / scaling,
                "relative_error": _distance(run.latent, latent),
            }
            for run in (unrouted, *(run for run in runs if run.steps == steps))
        ]

    # -- calls -------------------------------------------------------------------------------------------------------

    def _calls(self, group: WorkerGroup) -> dict[str, Any]:
        """Seconds of a call each way, in turns."""
        network, copies = self._network, self._copies
        x, fixed = network.inputs(network.call)
        kwargs = network.arguments(x, fixed, 1.0)
        taken: dict[str, list[float]] = {}
        group(**kwargs)  # pays for the trace and for memory
        for _ in range(self._rounds):
            seconds = {
                "two_copies": together(copies, "call", network.call),
                "half": together(copies, "call", network.half),
                "half_all_keys": together(copies, "call", network.half, True),
                "alone": copies[0].ask("call", network.call),  # last: its result is compared
            }
            group.begin()
            begin = time.perf_counter()
            banded = group(**kwargs)[0]
            seconds["bands"] = time.perf_counter() - begin
            stats = group.stats()
            seconds["wait"] = statistics.mean(record.wait for record in stats.records)
            if self._peers:
                seconds["ulysses"] = together(self._peers, "call", network.call)
            for what, each in seconds.items():
                taken.setdefault(what, []).append(each)
        unrouted = torch.from_numpy(copies[0].ask("output"))
        errors = {"relative_error": _distance(banded, unrouted)}
        if self._peers:
            errors["ulysses_relative_error"] = _distance(torch.from_numpy(self._peers[0].ask("output")), unrouted)
        size = {"size": network.words(network.call), "bands": RANKS, "mib_per_call": stats.bytes_per_call / MIB}
        return {**self._facts, **size, **_compared(taken), **errors, "rounds": taken}

    # -- runs --------------------------------------------------------------------------------------------------------

    def _run(self, group: WorkerGroup, plan: Plan, steps: int) -> tuple[float, torch.Tensor]:
        """Seconds of a whole run, from the first call to the last result, and its latent."""
        network = self._network
        x, fixed = network.inputs(network.run)
        group.begin([float(network.timestep(time)) for time in times(steps)], plan=plan)
        begin = time.perf_counter()
        *_, x = euler(lambda x, time: group(**network.arguments(x, fixed, time))[0], x, steps)
        seconds = time.perf_counter() - begin
        group.stats()  # waits until every rank is done
        return seconds, x

    @contextmanager
    def _group(self, plan: Plan) -> Iterator[WorkerGroup]:
        """Keep two ranks with the weights that every copy has."""
        network, module = self._network, self._module
        example = (), network.arguments(*network.inputs(network.run), 1.0)
        if plan is PUBLISHED:
            plan = replace(plan, cuts=self._published_cuts(example))
        with WorkerGroup(
            module,
            plan,
            ["cpu"] * RANKS,
            example_inputs=example,
            estimate=lambda _: (self._blocks, [1.0] * RANKS, 0.0),
            ranks=RankOptions(threads_per_rank=1, call_timeout=1800, idle=self._idle),
        ) as group:
            yield group
            self._idle.absorb(group.release())

    def _published_cuts(self, example: Any) -> tuple[str, ...]:
        if self._network.kind == UNET:
            return PUBLISHED_CUTS["sd15"][RANKS]
        skeleton = meta_copy(self._module)
        return even_cuts(trace(skeleton, family_of(skeleton, *example), *example), RANKS)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def _compared(taken: dict[str, list[float]]) -> dict[str, float]:
    """Medians, and how they compare."""
    median = {what: statistics.median(each) for what, each in taken.items()}
    speedup, scaling = median["alone"] / median["bands"], RANKS * median["alone"] / median["two_copies"]
    found = {f"{what}_s": seconds for what, seconds in median.items()}
    found |= {
        "scaling": scaling,
        "speedup": speedup,
        "share_of_machine": speedup / scaling,
        "share_of_half": median["half"] / median["bands"],
        "share_of_half_all_keys": median["half_all_keys"] / median["bands"],
        "wait_share": median["wait"] / median["bands"],
    }
    if "ulysses" in median:
        found["ulysses_speedup"] = median["alone"] / median["ulysses"]
    return found


def main() -> None:
    """Measure the networks, one after the other."""
    parser = argparse.ArgumentParser(description="Measure calls in bands and whole runs.")
    parser.add_argument("--only", choices=[network.name for network in NETWORKS], help="measure this network alone")
    parser.add_argument("--quick", action="store_true", help="narrow networks, one round")
    parser.add_argument("file", nargs="?", type=Path, default=FILE)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, Any]]] = {"calls": [], "rows": []}
    if given.only and given.file.exists():
        before = json.loads(given.file.read_text(encoding="utf-8"))
        if before["quick"] == given.quick:
            found = {what: [row for row in before[what] if row["network"] != given.only] for what in found}
    for network in QUICK if given.quick else NETWORKS:
        if given.only not in (None, network.name):
            continue
        with torch.inference_mode(), ExitStack() as stack:
            copies = stack.enter_context(copies_of(network, RANKS))
            peers = stack.enter_context(copies_of(network, RANKS, ulysses=True)) if network.has_peer else ()
            idle = stack.enter_context(closing(IdleWorkers()))
            calls, rows = Measuring(network, copies, peers, idle, 1 if given.quick else ROUNDS).all()
        found["calls"].append(calls)
        found["rows"] += rows
    order = [network.name for network in NETWORKS]
    for each in found.values():
        each.sort(key=lambda row: order.index(row["network"]))
    facts = {"batch": 1, "threads": 1, "dtype": "float32", "quick": given.quick}
    write_json(str(given.file), {**facts, **found}, "python tools/measure/bands.py" + (" --quick" if given.quick else ""))


if __name__ == "__main__":
    main()
