"""The picture of the report: what it shows of records that are known."""

from types import SimpleNamespace

import pytest
import torch
from PIL import ImageColor

from asyncdiff_nodes.engine import Plan
from asyncdiff_nodes.engine.telemetry import CallRecord, RankReport
from asyncdiff_nodes.host.page import timeline as drawing
from asyncdiff_nodes.host.page.timeline import timeline

SYNCHRONOUS, ASYNCHRONOUS, WAITING = (
    ImageColor.getrgb(colour) for colour in (drawing._SYNCHRONOUS, drawing._ASYNCHRONOUS, drawing._WAITING)
)


def run(*ranks, line="2 segments on cpu, cpu"):
    """A finished run, of which each rank made these calls: synchronous, start, end, waits."""
    reports = []
    for rank, calls in enumerate(ranks):
        records = tuple(CallRecord("", 0, rank, rank, how, start, end, 1.0, 0.0, 0, waits) for how, start, end, waits in calls)
        reports.append(RankReport(rank, 0, "cpu", rank, {}, 0, records))
    return SimpleNamespace(line=line, plan=Plan(segments=2), stats=SimpleNamespace(ranks=tuple(reports)))


def lanes(picture):
    """Of each row of bars, from top to bottom: colour and share of the width of each bar."""
    found = []
    pixels = [[tuple(pixel) for pixel in row] for row in picture[0].mul(255).round().int().tolist()]
    for row in pixels[: len(pixels) - 60]:  # above the legend
        bars = {colour: row.count(colour) for colour in (SYNCHRONOUS, ASYNCHRONOUS, WAITING)}
        bars = {colour: count for colour, count in bars.items() if count > 10}
        if bars and (not found or found[-1] != bars):
            found.append(bars)
    return found


def test_each_rank_has_a_lane_with_its_calls():
    first = [(True, 50.0, 51.0, ()), (False, 52.0, 54.0, ((53.0, 53.5),))]
    second = [(True, 51.0, 52.0, ()), (False, 52.0, 56.0, ())]
    picture = timeline(run(first, second))
    assert picture.dtype == torch.float32 and picture.shape[0] == 1 and picture.shape[2:] == (1200, 3)
    upper, lower = lanes(picture)
    assert upper.keys() == {SYNCHRONOUS, ASYNCHRONOUS, WAITING} and lower.keys() == {SYNCHRONOUS, ASYNCHRONOUS}
    second = lower[ASYNCHRONOUS] / 4  # its width
    for bars, colour, seconds in (
        (upper, SYNCHRONOUS, 1.0),
        (upper, ASYNCHRONOUS, 1.5),
        (upper, WAITING, 0.5),
        (lower, SYNCHRONOUS, 1.0),
    ):
        assert abs(bars[colour] - seconds * second) < 4


def test_a_long_line_is_wrapped_and_ranks_add_lanes():
    calls = [(False, 0.0, 1e-3, ())]
    heights = [timeline(run(*[calls] * ranks)).shape[1] for ranks in (1, 2, 4)]
    assert heights[2] - heights[1] == 2 * (heights[1] - heights[0])
    assert timeline(run(calls, line="a long note " * 30)).shape[1] > heights[0]


def test_a_run_of_the_host_has_no_lane():
    assert lanes(timeline(SimpleNamespace(line="ComfyUI sampled as usual: no CUDA device", stats=None))) == []


def test_ticks_are_round_and_few():
    assert drawing._ticks(0.88) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    for seconds in (3e-4, 0.009, 1.0, 8.0, 59.9, 4321.0):
        assert 4 <= len(drawing._ticks(seconds)) <= 9
