"""Weights are sharded, and nothing crosses that need not: counted by the ranks and their transport, not by the plan."""

import pytest
import torch

import golden
import toys
from asyncdiff_nodes.engine import Plan, find_family, meta_copy, trace
from reuse import running
from toys import TOY


def owners_of(weight, owners):
    """Segments that compute the block that the weight lies in, all of them for glue."""
    return next((segments for block, segments in owners.items() if weight.startswith(block + ".")), None)


def segments_by_cuts(graph, plan):
    """Block -> the segments that compute it, from the meaning of cuts alone."""
    owners, ahead = {}, list(plan.cuts)
    segments = {0 if plan.forecast else plan.segments - 1}
    for name in graph.names:
        if ahead and (name == ahead[0] or name.startswith(ahead[0] + ".")):
            segments = {plan.segments - len(ahead)}
            ahead.pop(0)
        owners[name] = segments
    assert not ahead
    first = next(i for i, name in enumerate(graph.names) if name == plan.cuts[0] or name.startswith(plan.cuts[0] + "."))
    own = {name: max(of) for name, of in owners.items()}
    for producer, consumer in graph.edges if plan.forecast else ():
        if producer < first <= consumer:
            for name in graph.names[: producer + 1]:
                owners[name] = owners[name] | {own[graph.names[consumer]]}
    return owners


def bytes_by_edges(graph, owners, plan):
    """Each crossing producer once per rank that reads it."""
    total = 0
    for rank in range(plan.world_size):
        mine = min(rank, plan.segments - 1)
        total += sum(
            block.output_bytes
            for p, block in enumerate(graph.blocks)
            if mine not in owners[block.name] and any(a == p and mine in owners[graph.names[b]] for a, b in graph.edges)
        )
    return total


def check_weights(module, graph, plan, owners, reports):
    sizes = {name: tensor.nbytes for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    assert [report.rank for report in reports] == list(range(plan.world_size))
    for report in reports:
        assert report.segment == min(report.rank, plan.segments - 1)
        expected = {name for name in sizes if report.segment in (owners_of(name, owners) or {report.segment})}
        assert report.weights == {name: sizes[name] for name in expected}
        assert report.weight_bytes == sum(report.weights.values())
        assert report.replicated_bytes == graph.glue_bytes
    assert set().union(*(report.weights for report in reports)) == sizes.keys()
    on_rank = [min(rank, plan.segments - 1) for rank in range(plan.world_size)]
    copies = {name: plan.world_size if (of := owners_of(name, owners)) is None else sum(map(on_rank.count, of)) for name in sizes}
    assert sum(report.weight_bytes for report in reports) == sum(size * copies[name] for name, size in sizes.items())


def check_bytes(stats, graph, plan, owners, calls):
    per_call = bytes_by_edges(graph, owners, plan)
    assert per_call > 0
    assert stats.planned_bytes == per_call
    sent = {k: sum(r.bytes_sent for r in stats.records if r.call == k and not r.ahead) for k in calls}
    assert sent == dict.fromkeys(calls, per_call)
    assert {r.call for r in stats.records} == set(calls)
    ahead = [r for r in stats.records if r.ahead]
    assert stats.bytes_sent == per_call * len(calls) + sum(r.bytes_sent for r in ahead)
    assert all(r.call == plan.warmup - 1 and not r.synchronous for r in ahead) and bool(ahead) == bool(plan.forecast)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15_N3_S2_W3_noshift_T12_dealias"])
def test_unet_with_replicas(name, golden_group):
    plan = golden.plan_of(name)
    unet, group = golden.unet("sd15"), golden_group("sd15", plan)
    group.begin(golden.scheduler(12).timesteps)
    golden.sample(group, "sd15", 12)
    stats = group.stats()
    skeleton, family = meta_copy(unet), find_family(unet)
    latents = golden.inputs("sd15")["latents"]
    graph = trace(skeleton, family, (torch.cat([latents, latents]), 1), golden.conditioning("sd15"))
    owners = segments_by_cuts(graph, plan)
    assert set().union(*owners.values()) == {0, 1, 2}
    check_weights(unet, graph, plan, owners, stats.ranks)
    check_bytes(stats, graph, plan, owners, calls=[0, 1, 2, 3, 5, 7, 9, 11])


@pytest.mark.parametrize("plan", [p for p in toys.PLANS if p.cuts], ids=toys.label)
def test_random_network(plan, toy_group):
    group, net = toy_group(plan)
    timesteps = [900, 800, 700, 600, 500, 400]
    group.begin(timesteps)
    toys.denoise(group, timesteps, batch=5)
    stats = group.stats()
    skeleton = meta_copy(net)
    graph = trace(skeleton, TOY, *TOY.example_inputs(skeleton, None, 5))
    owners = segments_by_cuts(graph, plan)
    check_weights(net, graph, plan, owners, stats.ranks)
    begin = next(k for k in range(plan.warmup, 9) if (k - 1) % plan.stride == 0)
    check_bytes(stats, graph, plan, owners, [*range(plan.warmup), *range(begin, 6, plan.stride)])


def test_begin_forgets_the_records_of_the_run_before(toy_group):
    group, _ = toy_group(toys.PLAIN)
    group.begin()
    toys.denoise(group, [9, 8, 7])
    assert {r.call for r in group.stats().records} == {0, 1, 2}
    group.begin()
    assert group.stats().records == []
    toys.denoise(group, [5])
    records = group.stats().records
    assert {r.call for r in records} == {0}
    assert all(r.synchronous and r.compute >= 0 and r.wait >= 0 and r.end >= r.start for r in records)


def test_records_are_told_while_the_run_goes_on(toy_group):
    group, _ = toy_group(toys.PLAIN)
    told, after = [], []

    def tell(record):
        told.append((record.rank, record.call))

    group.begin(on_record=tell)
    x, kwargs = toys.inputs(3)
    for t in (900, 800, 700):
        group(x, t, **kwargs)
        after.append(len(told))
    # a rank's record follows its result, so of a call it is known at the latest in the next
    assert after[1] >= group.plan.segments and after[2] >= 2 * group.plan.segments
    records = group.stats().records
    assert sorted(told) == sorted((r.rank, r.call) for r in records)
    group.begin()
    group(x, 600, **kwargs)
    assert len(told) == len(records)


def test_drift_is_the_relative_change_of_what_arrived(toy_group):
    """Against the blocks' own outputs, in synchronous calls."""
    plan = toys.PLAIN
    group, net = toy_group(plan)
    group.begin()
    x, kwargs = toys.inputs(3)
    outputs, hooks = {}, []
    for name in toys.block_names(net):
        hook = net.get_submodule(name).register_forward_hook
        hooks.append(hook(lambda _, __, out, name=name: outputs.setdefault(name, []).append(out)))
    with torch.no_grad():
        for t in (800, 100):
            net(x, t, **kwargs)
            group(x, t, **kwargs)
    found = {name: drift for r in group.stats().records if r.call == 1 for name, drift in r.drift.items()}
    assert found
    first, second = group.stats().calls
    assert (first.why, first.synchronous, first.drift) == ("warm-up", True, None) and second.why == "warm-up"
    assert second.drift == pytest.approx(sum(found.values()) / len(found))
    for name, drift in found.items():
        old, new = (torch.cat([v.flatten() for v in (o if isinstance(o, tuple) else (o,))]) for o in outputs[name])
        assert drift == pytest.approx(((new - old).norm() / old.norm()).item(), rel=1e-4)


def test_weight_that_two_blocks_share_reaches_both_owners():
    net = toys.chain(toys.ToyBlock, toys.ToyBlock)
    net.blocks[1].conv.weight = net.blocks[0].conv.weight
    plan = Plan(warmup=2, cuts=("blocks.0", "blocks.1"))
    with running(net, plan, family=TOY) as group, torch.no_grad():
        x, kwargs = toys.inputs(0)
        assert torch.equal(group(x, 5, **kwargs), net(x, 5, **kwargs))
        assert "blocks.1.conv.weight" in group.stats().ranks[1].weights


class TwoInputs(toys.ToyNet):
    """The sample goes into the first block, a control into the last, as residuals of a ControlNet do."""

    def forward(self, sample, timestep, context=None, control=None):
        hidden, emb = sample, self.embed(sample, timestep)
        for index, block in enumerate(self.blocks):
            if index == len(self.blocks) - 1:
                hidden = hidden + control["output"][0]
            hidden = block(hidden, emb, context)
        return hidden


def test_inputs_go_only_to_the_ranks_that_read_them(monkeypatch):
    torch.manual_seed(0)
    net = TwoInputs([toys.ToyBlock(4, 3) for _ in range(4)]).eval()
    sample, given = toys.inputs(0)
    control = {"output": [torch.randn(2, 4, 8, 8)]}
    inputs = (sample, 5), {"context": given["context"], "control": control}
    plan = Plan(segments=2, warmup=1, cuts=("blocks.0", "blocks.2"))
    with running(net, plan, family=TOY, example_inputs=inputs) as group:
        sent = {0: [], 1: []}
        original = group._ranks.send

        def send(rank, header, tensors=(), *, deadline):
            if header[0] == "call":
                sent[rank].append([t for t in tensors if t.shape == sample.shape])
            original(rank, header, tensors, deadline=deadline)

        monkeypatch.setattr(group._ranks, "send", send)
        group.begin()
        found = group(sample, 5, **given, control=control)
        assert torch.equal(found, net(sample, 5, **given, control=control))
        assert [torch.equal(t, sample) for t in sent[0][0]] == [True]
        assert [torch.equal(t, control["output"][0]) for t in sent[1][0]] == [True]
        group(sample + 1, 4, **given, control=control)
        assert [len(calls[1]) for calls in sent.values()] == [1, 0]  # nor is again what did not change
