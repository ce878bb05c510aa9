"""Numbers of the report, from records that are known."""

from dataclasses import replace

import pytest

from asyncdiff_nodes.engine import Plan
from asyncdiff_nodes.engine.telemetry import CallRecord
from asyncdiff_nodes.host.page.timing import Timing

PLAN = Plan(segments=2, stride=2, bands=3)
# two synchronous calls on three ranks, the last of which is a replica; each computes for half a second
RECORDS = [CallRecord("", call, rank, min(rank, 1), True, call, call + 1, 0.5, 0.0, 0) for call in range(2) for rank in range(3)]


def test_in_synchronous_calls_in_bands_all_ranks_compute_and_nothing_twice():
    banded = [replace(record, banded=True) for record in RECORDS]
    timing = Timing(PLAN, ["cpu"] * 3, banded, work=1.25)
    assert timing.computing == banded
    assert timing.step_seconds == pytest.approx(1.0 / PLAN.stride)
    assert timing.sequential_seconds == pytest.approx(1.5)


def test_without_bands_replicas_only_listen_and_blocks_may_be_computed_twice():
    timing = Timing(replace(PLAN, bands=1), ["cpu"] * 3, RECORDS, work=1.25)
    assert {record.rank for record in timing.computing} == {0, 1}
    assert timing.sequential_seconds == pytest.approx(1.0 / 1.25)


def test_calls_that_work_ahead_tell_what_one_device_takes_where_the_others_are_in_bands():
    """In bands, ranks also exchange; on one device, asynchronous calls would slow each other down."""
    banded = [replace(record, banded=True, compute=2.0) for record in RECORDS]
    ahead = [replace(record, synchronous=False, call=record.call + 2) for record in RECORDS]
    apart, together = (Timing(PLAN, devices, banded + ahead, work=1.25) for devices in (["a", "b", "c"], ["cpu"] * 3))
    assert apart.sequential_seconds == pytest.approx(1.0 / 1.25)
    assert together.sequential_seconds == pytest.approx(6.0)
