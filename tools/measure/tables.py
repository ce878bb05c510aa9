"""Write the tables of the pages from docs/data, between the marks that name them.

python tools/measure/tables.py
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/index.md",
    "docs/models.md",
    "docs/quality-more.md",
    "docs/quality.md",
    "docs/reliability.md",
)
SAMPLERS = {
    "ddim": "DDIM",
    "euler": "Euler",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_karras": "DPM++ 2M Karras",
    "euler_a": "Euler a",
    "heun": "Heun",
}
NAMES = {"sd15": "SD 1.5", "sd21": "SD 2.1", "sdxl": "SDXL", "flux": "FLUX.1"}
BACKENDS = {"comfyui": "ComfyUI", "diffusers": "diffusers"}
VARIANTS = {"ours-fast": "fast cuts", "ours-stale": "stale hidden states"}
ENOUGH = 64  # pairs, for the short tables
Row = dict[str, Any]


def _found(name: str) -> Row:
    return json.loads((ROOT / "docs" / "data" / f"{name}.json").read_text(encoding="utf-8"))


def rows_of(name: str) -> list[Row]:
    """Those of docs/data/NAME.json."""
    return _found(name)["rows"]


def cases(name: str) -> Iterator[tuple[str, Row, dict[str, Row]]]:
    """Of each plan of each run in docs/data/NAME.json: the run, its sequential row, and method -> row."""
    for (sampler, steps), run in itertools.groupby(rows_of(name), key=lambda row: (row["sampler"], row["steps"])):
        sequential, *others = run
        for _, plan in itertools.groupby(others, key=lambda row: row["plan"]):
            yield f"{SAMPLERS[sampler]}, {steps}", sequential, {row["method"]: row for row in plan}


def pair(name: str) -> str:
    """Two pictures beside each other, with the seconds that a step of theirs took; tools/demo_pictures.py makes them."""
    one, every = (next(row for row in rows_of(name) if row["method"] == method) for method in ("sequential", "AsyncDiff"))
    pictures = (f"![{what}](docs/images/demo-{file}.png)" for what, file in (("one device", "one"), ("two devices", "all")))
    times = (f"{one['call_s']:.2f} seconds per step", f"**{every['call_s']:.2f} seconds per step**")
    return "\n".join(
        (
            "| one device, as KSampler does it | two devices, AsyncDiff |",
            "|:---:|:---:|",
            f"| {' | '.join(pictures)} |",
            f"| {' | '.join(times)} |",
        )
    )


def demo(name: str) -> str:
    """What the demo command prints."""
    lines = ["| method | steps | seconds per call | speed-up | PSNR |", "|---|---:|---:|---:|---:|"]
    for row in rows_of(name):
        near = f"{row['psnr']:.1f} dB" if "psnr" in row else ""
        lines.append(f"| {row['method']} | {row['steps']} | {row['call_s']:.3f} | {row['speedup']:.2f}x | {near} |")
    return "\n".join(lines)


SAME = {"bands", "branches", "one device"}  # plans whose pictures are the same up to rounding


def _chosen(name: str) -> dict[tuple[Any, ...], str]:
    """What a whole run with *Balanced* gains, and whether its picture is the same, by network, devices, CFG, steps and link."""
    rows = (row for row in rows_of(name) if row["chosen"])
    return {
        (row["network"], row["devices"], row["cfg"], row["steps"], row["link"]): (
            f"{row['run_speedup']:.2f}x, {'same' if row['plan'] in SAME else 'near'}"
        )
        for row in rows
    }


def gains(name: str) -> str:
    """Who gains what: whole runs, what was measured of two branches, and the weights of a large model."""
    found = _chosen(name)
    links = ("NVLink", "PCIe with P2P", "PCIe without P2P")
    halves = next(row for row in rows_of("bench") if row["branches"] == 2 and row["segments"] == 1 and not row["projected"])
    held = next(row for row in rows_of("plans") if (row["model"], row["devices"]) == ("qwen-image", 2))
    each = " and ".join(f"{mib / 1024:.1f}" for mib in held["weights_mib"])
    lines = [f"| your GPUs | a whole run | {' | '.join(links)} |", "|---|---|---|---|---|"]
    for devices, cfg, network, steps in (
        (2, 1, "flux", 8), (2, 1, "flux", 20), (2, 1, "sdxl", 20), (4, 1, "flux", 8), (4, 1, "flux", 20), (4, 1, "sdxl", 20),
        (4, 7, "sdxl", 20),
    ):  # fmt: skip
        cells = " | ".join(found[network, devices, cfg, steps, link] for link in links)
        gpus = f"{devices}, CFG {'1' if cfg == 1 else 'above 1'}"
        lines.append(f"| {gpus} | {NAMES[network]}, {steps} steps | {cells} |")
    measured = f"{halves['speedup']:.2f}x, same, measured on CPUs"
    lines.append(f"| 2, CFG above 1 | any: one computes the prompt, one the negative prompt | {measured} | | |")
    parts = f"each holds its part only: of Qwen-Image ({held['whole_mib'] / 1024:.1f} GiB in fp16) {each}"
    lines.append(f"| too small for the model | {parts} | not measured | | |")
    return "\n".join(lines)


def projected(name: str) -> str:
    """What a whole run with *Balanced* gains at CFG 1, on given links."""
    found, links = _chosen(name), list(_found(name)["links"])
    sizes = {row["network"]: row["size"] for row in rows_of(name)}
    lines = [f"| model, size | GPUs | steps | {' | '.join(links)} |", "|---|---:|---:|" + "---:|" * len(links)]
    for network, devices, cfg, steps in dict.fromkeys(key[:4] for key in found):
        if cfg == 1:
            cells = " | ".join(found[network, devices, cfg, steps, link] for link in links)
            lines.append(f"| {NAMES[network]}, {sizes[network]} | {devices} | {steps} | {cells} |")
    return "\n".join(lines)


def short(name: str) -> str:
    """PSNR and costs, of runs with enough pairs."""
    lines = ["| sampler, steps | plan N,S,W | published method | AsyncDiff here | fewer steps |", "|---|---|---:|---:|---:|"]
    for run, sequential, rows in cases(name):
        if sequential["pairs"] < ENOUGH:
            continue
        cells = (f"{rows[m]['psnr']:.1f} ({rows[m]['cost']:.1f})" for m in ("published", "ours", "fewer-steps"))
        lines.append(f"| {run} | {rows['ours']['plan']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def full(name: str) -> str:
    """PSNR with intervals, SSIM and what is gained."""
    variant = "ours-stale" if any(row["method"] == "ours-stale" for row in rows_of(name)) else "ours-fast"
    lines = [
        f"| sampler, steps | pairs | plan N,S,W + C | published method | AsyncDiff here | {VARIANTS[variant]} | fewer steps "
        "| over published | over fewer steps |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for run, _, rows in cases(name):
        ours, published, fewer = (rows[m] for m in ("ours", "published", "fewer-steps"))
        cells = (
            f"{r['psnr']:.1f} ± {r['psnr_ci'][1] - r['psnr']:.1f}, {r['ssim']:.3f} ({r['cost']:.1f})" if r else ""
            for r in (published, ours, rows.get(variant), fewer)
        )
        gains = (f"{ours['psnr'] - other['psnr']:+.1f}" for other in (published, fewer))
        plan = f"{ours['plan']} + {ours['cooldown']}"
        lines.append(f"| {run} | {ours['pairs']} | {plan} | {' | '.join(cells)} | {' | '.join(gains)} |")
    return "\n".join(lines)


def compressions(name: str) -> str:
    """PSNR and bytes with values that cross whole, and with fewer bytes."""
    lines = ["| sampler, steps | pairs | plan N,S,W + C | whole | half | int8 |", "|---|---:|---|---:|---:|---:|"]
    for run, _, rows in cases(name):
        ours = rows["ours"]
        cells = (
            f"{r['psnr']:.1f} ± {r['psnr_ci'][1] - r['psnr']:.1f}, {r['mib_per_call']:.3f} MiB"
            for r in (rows[m] for m in ("ours", "ours-half", "ours-int8"))
        )
        lines.append(f"| {run} | {ours['pairs']} | {ours['plan']} + {ours['cooldown']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sets(name: str) -> str:
    """Kernel distances, of runs with enough pairs."""
    lines = [
        "| sampler, steps | plan N,S,W | sequential | published method | AsyncDiff here | fewer steps |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for run, sequential, rows in cases(name):
        if sequential["pairs"] >= ENOUGH:
            cells = (
                f"{r['kernel_distance']:.1f}" for r in (sequential, *(rows[m] for m in ("published", "ours", "fewer-steps")))
            )
            lines.append(f"| {run} | {rows['ours']['plan']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def speed(name: str) -> str:
    """Speed-ups of plans, measured and projected, beside the paper's."""
    lines = [
        "| model, size | plan N,S | how | speed-up | ideal | of it | MiB per step | weights per device, GiB | paper |",
        "|---|---|---|---:|---:|---:|---:|---|---:|",
    ]
    for row in rows_of(name):
        plan = f"{row['segments']},{row['stride']}"
        if row["branches"] > 1:
            plan = f"{row['branches']} branches of {plan}" if row["segments"] > 1 else f"{row['branches']} branches"
        if row["segments"] > 1 and not row["fresh_skips"]:
            plan += " *Fast*"
        how = "projected" if row["projected"] else "measured"
        if row["what"] == "run":
            how += f", whole run of {row['steps']} steps, W={row['warmup']}"
        weights = ", ".join(f"{mib / 1024:.1f}" for mib in row["weights_mib"])
        paper = f"{row['published']:.1f}x" if row["published"] else ""
        speeds = f"{row['speedup']:.2f}x | {row['ideal']:.2f}x | {row['share_of_ideal']:.0%}"
        sent = f"{row['mib_per_call'] / row['stride']:.1f}"
        lines.append(f"| {NAMES[row['model']]}, {row['size']} | {plan} | {how} | {speeds} | {sent} | {weights} | {paper} |")
    return "\n".join(lines)


def coverage(name: str) -> str:
    """What tests show of each family."""
    lines = [
        "| family | in | blocks | exact | asynchronous | sharded | LoRA | ControlNet | inpaint |",
        "|---|---|---|:---:|:---:|:---:|:---:|:---:|:---:|",
    ]
    rows = rows_of(name)
    order = list(dict.fromkeys(row["family"] for row in rows))
    for row in sorted(rows, key=lambda row: order.index(row["family"])):
        what = ("exact", "async", "sharded", "lora", "controlnet", "inpaint")
        ticks = ("✓" if row[it] else "" for it in what)
        blocks = "falls back" if row["reason"] else "found" if row["found"] else "listed"
        lines.append(f"| {row['family']} | {BACKENDS[row['backend']]} | {blocks} | {' | '.join(ticks)} |")
    return "\n".join(lines)


def hosts(name: str) -> str:
    """How many networks of each ComfyUI are split."""
    lines = ["| ComfyUI | networks | exact on two ranks | fall back | cases |", "|---|---:|---:|---:|---:|"]
    for version, rows in itertools.groupby(rows_of(name), key=lambda row: row["comfyui"]):
        rows = list(rows)
        networks = {network for row in rows for network in row["class"]}
        fall_back = {network for row in rows if row["reason"] for network in row["class"]}
        failed = {network for row in rows if not row["exact"] for network in row["class"]} - fall_back
        cases = sum(len(row["tests"].get("exact", ())) for row in rows) + len(fall_back)
        exact = len(networks - fall_back - failed)
        lines.append(f"| {version} | {len(networks)} | {exact} | {len(fall_back)} | {cases} |")
    return "\n".join(lines)


def true_size(name: str) -> str:
    """Of the networks that people use most, at their true size."""
    lines = [
        "| family | latent | weights, GiB | blocks | found in, s | N | balance | MiB per step | weights per device, GiB |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows_of(name):
        latent = ", ".join(" x ".join(map(str, shape[1:])) for shape in row["input"])
        facts = (row["family"], latent, f"{row['whole_mib'] / 1024:.1f}", str(row["blocks"]), f"{row['seconds']:.1f}")
        first = facts if row["devices"] == 2 else ("",) * 5
        weights = ", ".join(f"{mib / 1024:.1f}" for mib in row["weights_mib"])
        lines.append(f"| {' | '.join(first)} | {row['devices']} | {row['balance']:.0%} | {row['mib_per_call']:.1f} | {weights} |")
    return "\n".join(lines)


def plans(name: str) -> str:
    """Of each model at its true size."""
    lines = [
        "| model | input | weights, GiB | N | balance | MiB per step | weights per device, GiB |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for row in rows_of(name):
        first = row["devices"] == 2
        model = (row["model"], " x ".join(map(str, row["input"])), f"{row['whole_mib'] / 1024:.1f}") if first else ("",) * 3
        weights = ", ".join(f"{mib / 1024:.1f}" for mib in row["weights_mib"])
        lines.append(f"| {' | '.join(model)} | {row['devices']} | {row['balance']:.0%} | {row['mib_per_call']:.1f} | {weights} |")
    return "\n".join(lines)


def control_nets(name: str) -> str:
    """Seconds per step with a ControlNet, computed here or there."""
    plans = {"one device": "KSampler, one device", "segments": "2 segments", "branches": "2 branches"}
    lines = ["| plan | ControlNet | seconds per step | speed-up |", "|---|---|---:|---:|"]
    for row in rows_of(name):
        where = "by ComfyUI" if (row["plan"], row["control_nets"]) == ("one device", "fresh") else row["control_nets"]
        lines.append(f"| {plans[row['plan']]} | {where} | {row['seconds_per_step']:.2f} | {row['speedup']:.2f}x |")
    return "\n".join(lines)


def start(name: str) -> str:
    """Seconds to the end of the first step, by what ranks are there."""
    models = list(dict.fromkeys(row["model"] for row in rows_of(name)))
    found = {(row["model"], row["ranks"]): f"{row['seconds']:.1f}" for row in rows_of(name)}
    what = {
        "one device": "KSampler, one device",
        "none": "no processes yet",
        "of another plan": "those of another plan",
        "of the same plan": "those of the same plan",
    }
    lines = [f"| | {' | '.join(models)} |", "|---|" + "---:|" * len(models)]
    return "\n".join([*lines, *(f"| {what[it]} | {' | '.join(found[model, it] for model in models)} |" for it in what)])


def faults(name: str) -> str:
    """What came of each kind of fault in each phase, and the sum of it."""
    ends = ("undisturbed", "restarted", "finished by ComfyUI")
    counts = ("injected", "wrong", "late", "orphans", "leaked_files")
    lines = [
        "| phase | kind | injected | wrong | late | orphans | leaked files | undisturbed | restarted | finished by ComfyUI |",
        "|---|---|" + "---:|" * 8,
    ]
    found = _found(name)
    for row in (*found["rows"], {"phase": "all", "kind": "", **found["total"]}):
        numbers = (*(row[what] for what in counts), *(row["ends"].get(how, 0) for how in ends))
        lines.append(f"| {row['phase']} | {row['kind']} | {' | '.join(map(str, numbers))} |")
    return "\n".join(lines)


def soak(name: str) -> str:
    """What came of the prompts, and what grew."""
    found = _found(name)
    counts = ("prompts", "settings", "pictures", "cancelled", "mismatches", "failed", "orphans")
    grown = {**found["growth"], "memory, MiB": round(found["growth"]["memory"] / 2**20, 1)}
    del grown["memory"]
    lines = [f"| {' | '.join(counts)} |", "|" + "---:|" * len(counts), f"| {' | '.join(str(found[it]) for it in counts)} |", ""]
    lines += [f"| growth of {' | '.join(grown)} |", "|" + "---:|" * len(grown), f"| {' | '.join(map(str, grown.values()))} |"]
    return "\n".join(lines)


def compatibility(name: str) -> str:
    """What the fast tests came to with each set of versions."""
    what = ("passed", "failed", "skipped")
    lines = ["| tests | Python | PyTorch | passed | failed | skipped |", "|---|---|---|" + "---:|" * len(what)]
    for row in rows_of(name):
        tests = f"in ComfyUI {row['comfyui']}" if row["comfyui"] else "engine"
        lines.append(f"| {tests} | {row['python']} | {row['torch']} | {' | '.join(str(row[it]) for it in what)} |")
    return "\n".join(lines)


def banded_calls(name: str) -> str:
    """A call in bands beside one alone, what bands could be at best, and another's way."""
    found = _found(name)
    ways = ("two copies", "at best", "bands", "diffusers", "of best", "of two copies", "waiting", "MiB per call", "error")
    lines = [f"| network, size | one device, s | {' | '.join(ways)} |", "|---|" + "---:|" * (1 + len(ways))]
    for row in found["calls"]:
        speeds = (
            f"{row['scaling']:.2f}x",
            f"{row['alone_s'] / row['half_all_keys_s']:.2f}x",
            f"{row['speedup']:.2f}x",
            f"{row['ulysses_speedup']:.2f}x" if "ulysses_speedup" in row else "",
        )
        shares = (f"{row[what]:.0%}" for what in ("share_of_half_all_keys", "share_of_machine", "wait_share"))
        cells = (f"{row['alone_s']:.2f}", *speeds, *shares, f"{row['mib_per_call']:.1f}", f"{row['relative_error']:.0e}")
        lines.append(f"| {row['network']}, {row['size']} | {' | '.join(cells)} |")
    return "\n".join([*_trial(found), *lines])


def whole_runs(name: str) -> str:
    """Whole runs under each plan."""
    found = _found(name)
    lines = [
        "| network, size | steps | plan | seconds | speed-up | of two copies | error |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        if row["plan"] == "one device":
            first = f"{row['network']}, {row['size']} | {row['steps']}"
            lines.append(f"| {first} | one device | {row['seconds']:.2f} | | | |")
            continue
        plan = f"{row['plan']} ({row['peer']})" if row["peer"] else row["plan"]
        speeds = f"{row['run_speedup']:.2f}x | {row['share_of_machine']:.0%} | {row['relative_error']:.0e}"
        lines.append(f"| | | {plan} | {row['seconds']:.2f} | {speeds} |")
    return "\n".join([*_trial(found), *lines])


def _trial(found: Row) -> list[str]:
    note = "*A trial with `--quick`: narrow networks, on a machine that did other things as well. The times say nothing.*"
    return [note, ""] if found["quick"] else []


TABLES = {
    "pair": pair,
    "demo": demo,
    "gains": gains,
    "projected": projected,
    "short": short,
    "full": full,
    "compressions": compressions,
    "sets": sets,
    "speed": speed,
    "coverage": coverage,
    "hosts": hosts,
    "plans": plans,
    "true_size": true_size,
    "control_nets": control_nets,
    "start": start,
    "faults": faults,
    "soak": soak,
    "compatibility": compatibility,
    "banded_calls": banded_calls,
    "whole_runs": whole_runs,
}
MARKED = re.compile(r"(<!-- table (\w+) of ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, page: str) -> str:
    """``text`` with what its marks name; links are those of ``page``."""

    def table(mark: re.Match[str]) -> str:
        lines = TABLES[mark[2]](mark[3])
        return f"{mark[1]}\n{lines.replace('](docs/', '](') if page.startswith('docs/') else lines}\n\n{mark[4]}"

    return MARKED.sub(table, text)


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8"), page), encoding="utf-8")
