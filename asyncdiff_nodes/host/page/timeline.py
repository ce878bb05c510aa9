"""A picture of the last run: what each rank did when. Drawn with Pillow, which ComfyUI has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from asyncdiff_nodes.engine.telemetry import RankReport

from .report import RunRecord, part

_FINE = 3  # it is drawn so many times larger and then scaled down: a call may be narrower than a pixel
_WIDTH, _MARGIN = 1200 * _FINE, 20 * _FINE
_LANE, _BAR, _TICK, _LINE = 60 * _FINE, 48 * _FINE, 6 * _FINE, 26 * _FINE
_GAP = 2  # between calls without a pause; less than a pixel of the result
_INK, _AXIS = "#1c2430", "#7a869a"
_SYNCHRONOUS, _ASYNCHRONOUS, _WAITING = "#9aa5b1", "#2f9e8f", "#e4e7eb"
_LEGEND = {"synchronous": _SYNCHRONOUS, "asynchronous": _ASYNCHRONOUS, "waiting": _WAITING}


def timeline(record: RunRecord) -> torch.Tensor:
    """An image [1, H, W, 3] in 0..1 with one lane per rank; with one empty lane where the host computed everything itself."""
    ranks = record.stats.ranks if record.stats else ()
    font = ImageFont.load_default(18 * _FINE)
    title = _wrapped(record.line, font, _WIDTH - 2 * _MARGIN)
    labels = [f"rank {rank.rank}, {rank.device}\n{part(record.plan, rank)}" for rank in ranks]
    left = 2 * _MARGIN + max((font.getlength(line) for label in labels for line in label.split("\n")), default=0)
    top = 2 * _MARGIN + _LINE * len(title)
    bottom = top + _LANE * max(1, len(ranks))
    image = Image.new("RGB", (_WIDTH, bottom + 4 * _LINE), "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(title):
        draw.text((_WIDTH / 2, _MARGIN + _LINE * number), line, _INK, font, anchor="ma")
    origin, seconds = _extent(ranks)
    scale = (_WIDTH - 2 * _MARGIN - left) / seconds
    for lane, (rank, label) in enumerate(zip(ranks, labels, strict=True)):
        middle = top + _LANE * (lane + 0.5)
        draw.multiline_text((left - _MARGIN, middle), label, _INK, font, anchor="rm", align="right")
        for start, end, colour in _spans(rank):
            x, until = left + (start - origin) * scale, left + (end - origin) * scale
            draw.rectangle([x, middle - _BAR / 2, max(x, until - _GAP), middle + _BAR / 2], colour)
    draw.line([left, bottom, _WIDTH - 2 * _MARGIN, bottom], _AXIS, _FINE)
    for moment in _ticks(seconds):
        x = left + moment * scale
        draw.line([x, bottom, x, bottom + _TICK], _AXIS, _FINE)
        draw.text((x, bottom + 2 * _TICK), f"{moment:g} s", _INK, font, anchor="ma")
    _draw_legend(draw, bottom + 3 * _LINE, font)
    pixels = np.asarray(image.reduce(_FINE), dtype=np.float32)
    return torch.from_numpy(pixels / 255)[None]


def _extent(ranks: Sequence[RankReport]) -> tuple[float, float]:
    """Start of the first call, and seconds from there to the end of the last."""
    calls = [call for rank in ranks for call in rank.records]
    if not calls:
        return 0.0, 1.0
    origin = min(call.start for call in calls)
    return origin, max(call.end for call in calls) - origin


def _spans(rank: RankReport) -> Iterator[tuple[float, float, str]]:
    """Start, end and colour of each bar, in drawing order: waits are drawn over the calls that contain them."""
    calls = [call for call in rank.records if call.compute > 0]
    for call in calls:
        yield call.start, call.end, _SYNCHRONOUS if call.synchronous or call.banded else _ASYNCHRONOUS
    for call in calls:
        for start, end in call.waits:
            yield start, end, _WAITING


def _ticks(seconds: float) -> list[float]:
    """Round numbers from 0 to ``seconds``, at most nine."""
    power = 10.0 ** math.floor(math.log10(seconds / 8))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= seconds / 8)
    return [number * step for number in range(int(seconds / step) + 1)]


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """``text`` in lines of at most ``width``, with at least one word in each."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _draw_legend(draw: ImageDraw.ImageDraw, y: float, font: ImageFont.FreeTypeFont) -> None:
    """Draw each colour with its name, centred on the line at ``y``."""
    swatch = _LINE / 2
    widths = [swatch + _TICK + font.getlength(name) + 2 * _MARGIN for name in _LEGEND]
    x = (_WIDTH - sum(widths) + 2 * _MARGIN) / 2
    for (name, colour), width in zip(_LEGEND.items(), widths, strict=True):
        draw.rectangle([x, y - swatch / 2, x + swatch, y + swatch / 2], colour)
        draw.text((x + swatch + _TICK, y), name, _INK, font, anchor="lm")
        x += width
