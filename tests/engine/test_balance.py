"""Block times as the ranks measure them, and the cuts that follow."""

import pytest

import toys
from asyncdiff_nodes.engine import Plan, WorkerGroup
from toys import TOY

TIMES = list(range(950, 0, -50))


@pytest.fixture(scope="module")
def uneven():
    """A group whose block i takes i hundredths of a second, and its records of a run with a warm-up of 6."""
    net = toys.chain(*[toys.Slow] * 5)
    for index, block in enumerate(net.blocks):
        block.seconds = index / 100
    with WorkerGroup(net, Plan(warmup=6, cuts=("blocks.0", "blocks.3")), threads_per_rank=1, family=TOY) as group:
        group.begin(TIMES)
        toys.denoise(group, TIMES)
        yield group, group.stats().records


def test_few_calls_are_timed_and_never_the_first(uneven):
    group, records = uneven
    timed = {r.call for r in records if r.blocks}
    assert timed == {1, 2, 3, 6, 7, 8, 9}
    for record in records:
        owned = {group.placement.graph.names[i] for i in group.placement.owned(record.segment)}
        assert set(record.blocks) == (owned if record.call in timed and not record.ahead else set())


def test_a_block_s_time_is_its_own(uneven):
    """Without waits, sends and glue: each at least its sleep, all together no more than the call's computing."""
    _, records = uneven
    for record in records:
        assert sum(record.blocks.values()) <= record.compute
        for name, seconds in record.blocks.items():
            assert seconds >= int(name[-1]) / 100
