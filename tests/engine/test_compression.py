"""Fewer bytes: what is lost of a value, that losses do not add up, and that a group computes what the simulator does."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import toys
from asyncdiff_nodes.engine import Plan, PlanError, Simulator
from asyncdiff_nodes.engine.compression import GROUP, Decoder, Encoder, compressed, pack, unpack
from asyncdiff_nodes.engine.tensors import TensorMeta, flat
from toys import TOY

TIMESTEPS = list(range(980, 0, -75))
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def crossed(values, how):
    """What a receiver has after each of them, and how many bytes each took."""
    encoder, decoder, found, sizes = Encoder(), Decoder(), [], []
    for value in values:
        meta = TensorMeta.of(value)
        layout, decode = decoder.expect(meta, how)
        sent, sent_layout = encoder(value, meta, how)
        assert layout == sent_layout == TensorMeta.of(sent)
        found.append(decode(sent))
        sizes.append(layout.nbytes)
        assert TensorMeta.of(found[-1]) == meta
    return found, sizes


def by_group(value):
    """Its elements in memory order, by what they share a scale with."""
    return torch.nn.functional.pad(flat(value).double(), (0, -value.numel() % GROUP)).view(-1, GROUP)


@given(
    shape=st.lists(st.integers(1, 24), min_size=4, max_size=4),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.sampled_from([1e-3, 1.0, 1e4]),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
)
@settings(deadline=None, max_examples=60)
def test_each_element_is_as_exact_as_the_largest_of_its_group_allows(shape, dtype, magnitude, layout):
    value = (magnitude * torch.randn(shape)).to(dtype).to(memory_format=layout)
    meta = TensorMeta.of(value)
    for how, exact in (("half", 2**-11), ("int8", 1 / 254)):
        packed, size = pack(value, how), -(-value.numel() // GROUP) * 4 + value.numel() * (2 if how == "half" else 1)
        assert packed.nbytes == size and compressed(meta, how).nbytes == min(size, meta.nbytes)
        largest = by_group(value).abs().amax(1, keepdim=True)
        error = (by_group(unpack(packed, meta, how)) - by_group(value)).abs()
        assert (error <= 1.01 * exact * largest + 1e-30).all()


def test_errors_of_differences_do_not_add_up():
    """After a thousand values the last one is as near as the second, and a value that stays is reached."""
    torch.manual_seed(0)
    moving = torch.randn(4, 8, 16, 16)
    values = [moving := moving + 0.05 * torch.randn_like(moving) for _ in range(1000)]
    found, sizes = crossed([*values, *[values[-1]] * 3], "int8")
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, values, strict=False)]
    assert errors[0] == 0 and max(errors) < 1e-3
    assert max(errors[900:]) < 1.5 * max(errors[1:100]), "0.05 of one, rounded to 1/254 of its group's largest"
    assert torch.allclose(found[-1], values[-1], atol=1e-6)
    assert sizes[0] == moving.nbytes and set(sizes[1:]) == {moving.numel() + moving.numel() // GROUP * 4}


@pytest.mark.parametrize("how", ["half", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(how, bad):
    before, after = torch.ones(2, GROUP), torch.ones(2, GROUP)
    after[1, 3] = bad
    found = crossed([before, after], how)[0][-1]
    assert torch.equal(found[0], after[0]) and not found[1].isfinite().any()


def test_large_numbers_do_not_overflow():
    value = torch.full((GROUP,), 1e6)
    assert torch.allclose(crossed([value], "half")[0][0], value)


def test_nothing_is_made_larger_and_whole_numbers_stay():
    for value in (torch.randn(1), torch.randn(GROUP).half(), torch.arange(GROUP)):
        meta = TensorMeta.of(value)
        assert compressed(meta, "half") == meta
        assert torch.equal(crossed([value, value], "int8")[0][1], value)


@pytest.mark.parametrize("how", ["int8", pytest.param("half", marks=pytest.mark.slow)])
@pytest.mark.parametrize("plan", toys.PLANS, ids=toys.label)
def test_group_computes_what_the_simulator_does(plan, how, toy_group):
    """Synchronous calls whole, asynchronous ones compressed, with the bytes that the plan says."""
    group, net = toy_group(plan)
    small = replace(plan, compression=how)
    results = {}
    for each in (plan, small):
        group.begin(TIMESTEPS, each)
        results[each] = toys.denoise(group, TIMESTEPS)
    stats = group.stats()
    with Simulator(net, small, family=TOY) as simulator:
        simulator.begin(TIMESTEPS)
        assert torch.equal(results[small], toys.denoise(simulator, TIMESTEPS))
    assert torch.equal(results[small][: plan.warmup], results[plan][: plan.warmup])
    assert 1e-7 < (results[small] - results[plan]).abs().max() < 0.02 * results[plan].abs().max()

    sent = {
        call: sum(record.bytes_sent for record in records if not record.ahead)
        for call, records in itertools.groupby(stats.records, lambda record: record.call)
    }
    synchronous = {call.call for call in stats.calls if call.synchronous}
    whole = group.placement.bytes_per_call
    assert all(sent[call] == whole for call in synchronous)
    later = sorted(call for call in sent if call not in synchronous)[1:]  # the first may be the one that goes whole
    assert later and {sent[call] for call in later} == {stats.planned_bytes}
    assert stats.planned_bytes < whole * (0.6 if how == "half" else 0.35)


def test_an_abandoned_run_leaves_nothing_to_the_next(toy_group):
    plan = replace(toys.PLANS[0], compression="int8")
    group, _ = toy_group(toys.PLANS[0])
    results = []
    for calls in (14, 5, 14):
        group.begin(TIMESTEPS, plan)
        results.append(toys.denoise(group, TIMESTEPS[:calls]))
    assert torch.equal(results[0], results[2]) and torch.equal(results[0][:5], results[1])


def test_unknown_compression_is_refused():
    with pytest.raises(PlanError, match="compression='zip': choose one of none, half, int8"):
        Plan(compression="zip")
