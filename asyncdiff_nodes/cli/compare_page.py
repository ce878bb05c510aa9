"""The page of ``asyncdiff compare``: plots, pictures and numbers in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from matplotlib.figure import Figure
from PIL import Image

from .tables import number

_SHOWN, _ZOOM = 8, 2  # pictures of a row, and their size beside the model's
_STYLE = {
    "published": ("s", "#b4532a"),
    "ours": ("o", "#2f9e8f"),
    "ours-fast": ("D", "#1c5fa8"),
    "ours-stale": ("P", "#56743a"),
    "ours-half": ("v", "#a8871c"),
    "ours-int8": ("x", "#7b4ea3"),
    "fewer-steps": ("^", "#7a869a"),
}

_PAGE = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string("""\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>asyncdiff compare</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1c2430 }
 table { border-collapse: collapse } td, th { padding: .15rem .6rem; text-align: right } th { border-bottom: 1px solid #9aa5b1 }
 td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left } .pictures td { text-align: left; white-space: nowrap }
 img { image-rendering: pixelated; max-width: 100% } code { background: #eef1f4; padding: .1rem .3rem }
</style></head><body>
<h1>What asynchrony does to the pictures</h1>
<p><code>{{ command }}</code></p>
<p>Distance from the sequential pictures of the same seeds (PSNR: more is nearer), against the cost in evaluations of the whole
network, and against the MiB that the ranks send in a call. Bars are 95 % intervals of the mean. <em>Kernel distance</em> is that
of all pictures from the training set, where it is known; below zero where they are near copies.</p>
{% for run in runs %}
<h2>{{ run.sampler }}, {{ run.steps }} steps, {{ run.pairs }} pairs</h2>
<img src="data:image/png;base64,{{ run.plot }}" alt="PSNR against cost and bytes" style="image-rendering: auto">
<table><tr><th>plan N,S,W</th><th>method</th><th>cool-down</th><th>cost</th><th>MiB per call</th><th>PSNR, dB</th>
<th>interval</th><th>SSIM</th><th>kernel distance</th></tr>
{% for row in run.rows %}
<tr><td>{{ row.plan or "" }}</td><td>{{ methods.get(row.method, row.method) }}</td><td>{{ row.cooldown }}</td>
<td>{{ "%.1f" % row.cost }}</td><td>{{ number(row.mib_per_call, 2) }}</td><td>{{ "%.1f" % row.psnr }}</td>
<td>{{ "%.1f" % row.psnr_ci[0] }} to {{ "%.1f" % row.psnr_ci[1] }}</td><td>{{ "%.3f" % row.ssim }}</td>
<td>{{ number(row.kernel_distance, 1) }}</td></tr>
{% endfor %}
</table>
<table class="pictures">
{% for row in run.rows %}
<tr><td>{{ row.plan or "" }}</td><td>{{ methods.get(row.method, row.method) }}</td>
<td><img src="data:image/png;base64,{{ row.pictures }}" alt=""></td></tr>
{% endfor %}
</table>
{% endfor %}
</body></html>
""")


def write_page(
    path: str, invocation: str, rows: Sequence[dict[str, Any]], pictures: Sequence[np.ndarray], methods: Mapping[str, str]
) -> None:
    """Write the page.

    Args:
        invocation: the command line that made it.
        rows: of the result, by run.
        pictures: of each row, [pairs, H, W, 3] in 0..1.
        methods: what to call each method.
    """
    runs = []
    pairs = zip(rows, pictures, strict=True)
    for (sampler, steps), group in itertools.groupby(pairs, key=lambda pair: (pair[0]["sampler"], pair[0]["steps"])):
        shown = [{"mib_per_call": None, **row, "pictures": _base64(_strip(drawn))} for row, drawn in group]
        facts = {"sampler": sampler, "steps": steps, "pairs": shown[0]["pairs"]}
        runs.append({**facts, "rows": shown, "plot": _plot(shown, methods)})
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(_PAGE.render(runs=runs, methods=methods, command=invocation, number=number), encoding="utf-8")


def _strip(pictures: np.ndarray) -> Image.Image:
    """The first of them, side by side."""
    pixels = np.concatenate(pictures[:_SHOWN], axis=1)
    image = Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    return image.resize((image.width * _ZOOM, image.height * _ZOOM), Image.Resampling.NEAREST)


def _plot(rows: Sequence[dict[str, Any]], methods: Mapping[str, str]) -> str:
    """PSNR against cost and against bytes, one colour per method."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    by_cost, by_bytes = figure.subplots(1, 2, sharey=True)
    for axes, key, label in (
        (by_cost, "cost", "cost, evaluations of the network"),
        (by_bytes, "mib_per_call", "MiB per call"),
    ):
        for method, (marker, colour) in _STYLE.items():
            of = [row for row in rows if row["method"] == method and row[key] is not None]
            points = sorted({(row[key], row["psnr"], row["psnr_ci"][1] - row["psnr"], row["plan"]) for row in of})
            if not points:  # fewer steps send nothing; without skips there is no cut for speed alone
                continue
            places, values, errors, plans = zip(*points, strict=True)
            line = "-" if method == "fewer-steps" else ""
            axes.errorbar(places, values, errors, marker=marker, color=colour, linestyle=line, capsize=2, label=methods[method])
            if method == "ours":
                for place, value, plan in zip(places, values, plans, strict=True):
                    axes.annotate(plan, (place, value), textcoords="offset points", xytext=(6, 4), fontsize=8)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    by_cost.set_ylabel("PSNR to the sequential picture, dB")
    by_cost.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    return base64.b64encode(buffer.getvalue()).decode()


def _base64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
