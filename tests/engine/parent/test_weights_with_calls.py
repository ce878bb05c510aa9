"""Parameters among a call's arguments, as patches of a model have: sent once, to the ranks whose blocks look at them."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import toys
from asyncdiff_nodes.engine import Plan, Simulator
from asyncdiff_nodes.engine.parent.rank_set import RankSet
from asyncdiff_nodes.engine.tensors import tensors_of
from reuse import running
from toys import TOY, ToyBlock

PLAN = Plan(warmup=4, cuts=("blocks.0", "blocks.2"))
TIMESTEPS = [900, 700, 500, 300]


class Patched(ToyBlock):
    """Hands its result to a function that comes with the call."""

    def forward(self, x, emb, context):
        return self.patch(super().forward(x, emb, torch.zeros(1, device=x.device)))


class PatchedNet(toys.ToyNet):
    """``weights`` are those of all blocks; each block looks at its own alone, and at the last."""

    def forward(self, sample, timestep, context, weights):
        for index, block in enumerate(self.blocks):
            block.patch = lambda h, own=weights[index], shared=weights[-1]: h * own + shared
        return super().forward(sample, timestep, context)


def patched_net():
    torch.manual_seed(1)
    return PatchedNet([Patched(4, 3) for _ in range(4)]).eval()


def weights(seed):
    generator = torch.Generator().manual_seed(seed)
    found = [nn.Parameter(torch.randn(8, 8, generator=generator), requires_grad=False) for _ in range(4)]
    return (*found, found[0])


def run(call, given):
    x, kwargs = toys.inputs(0)
    outputs = []
    for t in TIMESTEPS:
        outputs.append(call(x, t, weights=given, **kwargs))
        x = 0.8 * x + 0.3 * outputs[-1]
    return torch.stack(outputs)


@pytest.mark.parametrize("run_plan", [replace(PLAN, warmup=2, forecast=0), PLAN], ids=toys.label)
def test_once_and_where_they_are_looked_at(run_plan, start, monkeypatch):
    net, sent = patched_net(), []
    original = RankSet.send

    def send(ranks, rank, header, tensors=(), **options):
        if isinstance(header, tuple) and header[0] == "call":
            sent.append((rank, [tensor.clone() for tensor in tensors if tensor.shape == (8, 8)]))
        original(ranks, rank, header, tensors, **options)

    monkeypatch.setattr(RankSet, "send", send)
    sample, given = toys.inputs(0)
    example = ((sample, 5), {**given, "weights": weights(0)})
    group = start("patched", PLAN, net, family=TOY, example_inputs=example)
    with torch.no_grad(), Simulator(net, run_plan, family=TOY, example_inputs=example) as simulator:
        two, three = weights(2), weights(3)
        # what a run has not used is forgotten when the next begins
        for values, new in ((two, True), (two, False), (three, True), (two, True), (two, False)):
            sent.clear()
            group.begin(TIMESTEPS, run_plan)
            simulator.begin(TIMESTEPS)
            found = run(group, values)
            assert torch.allclose(found, run(simulator, values), rtol=0, atol=1e-5)
            got = {rank: [tensor for other, tensors in sent if other == rank for tensor in tensors] for rank, _ in sent}
            # the ranks of blocks 0 and 1, and of blocks 2 and 3, in either order; the last is the first
            counts = sorted(len(tensors) for tensors in got.values())
            assert counts == ([2, 3] if new else [0, 0])
            for tensors in filter(None, got.values()):
                own = (0, 1) if len(tensors) == 2 else (0, 2, 3)
                assert all(any(torch.equal(tensor, values[i]) for i in own) for tensor in tensors)


def test_after_a_move_ranks_have_those_of_their_blocks():
    net, values = patched_net(), weights(2)
    sample, given = toys.inputs(0)
    plan, options = Plan(warmup=9, cuts=PLAN.cuts), {"example_inputs": ((sample, 5), {**given, "weights": weights(0)})}
    with torch.no_grad(), running(net, plan, family=TOY, **options) as group:
        graph, before = group.placement.graph, group.placement
        for placement in (before, type(before)(graph, plan, (1, 3)), before):
            group.move(placement, lambda _: tensors_of(net))
            group.begin(TIMESTEPS)
            assert torch.equal(run(group, values), run(net, values))
