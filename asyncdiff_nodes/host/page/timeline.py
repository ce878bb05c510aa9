"""A picture of the last run: what each rank did when."""

from __future__ import annotations

import io

import numpy as np
import torch

from .report import RunRecord

_COLOURS = {True: "#9aa5b1", False: "#2f9e8f"}  # synchronous, asynchronous
_WAITING = "#e4e7eb"


def timeline(record: RunRecord) -> torch.Tensor:
    """One lane per rank, [1, H, W, 3] in 0..1; an empty one where the host computed everything itself.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:  # here, not above: the pack must load without it
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise RuntimeError(f"the timeline needs matplotlib ({error}): pip install matplotlib in ComfyUI's Python") from error
    from PIL import Image

    ranks = record.stats.ranks if record.stats else ()
    figure = Figure(figsize=(12, 1.6 + 0.6 * max(1, len(ranks))), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.set_title(record.line, fontsize=10)
    starts = [call.start for rank in ranks for call in rank.records]
    origin = min(starts, default=0.0)
    for lane, rank in enumerate(ranks):
        for synchronous, colour in _COLOURS.items():
            calls = [call for call in rank.records if call.synchronous is synchronous and call.compute > 0]
            spans = [(call.start - origin, call.end - call.start) for call in calls]
            axes.broken_barh(spans, (lane - 0.4, 0.8), facecolor=colour, edgecolor="white", linewidth=0.5)
            waits = [(start - origin, end - start) for call in calls for start, end in call.waits]
            axes.broken_barh(waits, (lane - 0.4, 0.8), facecolor=_WAITING)
    axes.set_yticks(range(len(ranks)), [f"rank {rank.rank}, {rank.device}\nsegment {rank.segment + 1}" for rank in ranks])
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    names = (("synchronous", _COLOURS[True]), ("asynchronous", _COLOURS[False]), ("waiting", _WAITING))
    figure.legend(handles=[Patch(color=c, label=n) for n, c in names], loc="outside lower center", ncols=3, frameon=False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    pixels = np.asarray(Image.open(buffer).convert("RGB"))
    return torch.from_numpy(pixels.astype(np.float32) / 255)[None]
