"""torch.compile of the blocks of each rank."""

import pytest
import torch

import toys
from asyncdiff_nodes.engine import Plan, Simulator, WorkerError, place
from asyncdiff_nodes.engine.tensors import tensors_of
from reuse import running
from toys import TOY, Telltale, ToyBlock

TIMESTEPS = [980, 860, 740, 620, 500, 380]
PLAN = Plan(segments=2, warmup=2, cuts=("blocks.0", "blocks.2"))
DEEP = 12  # blocks of one class, and torch compiles the same code eight times only, unless told


class Plus(torch.nn.Module):
    """What a compiled :class:`Telltale` computes."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args):
        return self.block(*args) + 1


def group_of(net, plan=PLAN, **how):
    return running(net, plan, family=TOY, compile={"backend": "eager", **how})


def test_every_block_of_every_rank_is_compiled_and_values_cross_as_ever():
    net = toys.chain(*[Telltale] * 2, *[ToyBlock] * 2)
    with group_of(net) as group:
        group.begin(TIMESTEPS)
        routed = toys.denoise(group, TIMESTEPS)
        drifts = [record.drift for record in group.stats().records if not record.synchronous]
        group.begin(TIMESTEPS, Plan(segments=2, warmup=99, cuts=PLAN.cuts))
        exact = toys.denoise(group, TIMESTEPS)
    assert any(drifts)
    assert not torch.equal(exact, toys.denoise(torch.no_grad()(net), TIMESTEPS)), "or nothing was compiled"
    net.blocks[0], net.blocks[1] = Plus(net.blocks[0]), Plus(net.blocks[1])
    assert torch.equal(exact, toys.denoise(torch.no_grad()(net), TIMESTEPS))
    with Simulator(net, PLAN, family=TOY) as simulator:
        simulator.begin(TIMESTEPS)
        assert torch.equal(routed, toys.denoise(simulator, TIMESTEPS))


def test_many_blocks_of_one_class_new_weights_and_a_move():
    torch.manual_seed(0)
    net = toys.ToyNet([Telltale(4, 1 + 2 * (i % 3)) for i in range(DEEP)]).eval()
    plan = Plan(segments=2, warmup=99)
    with group_of(net, plan) as group:
        for change in (lambda *_: None, renew, move):
            change(group, net)
            group.begin(TIMESTEPS)
            found = toys.denoise(group, TIMESTEPS)
            plus = toys.ToyNet([Plus(block) for block in net.blocks])
            plus.load_state_dict({name: value for name, value in net.state_dict().items() if "blocks" not in name}, strict=False)
            assert torch.equal(found, toys.denoise(torch.no_grad()(plus), TIMESTEPS))


def renew(group, net):
    """Other weights, as a LoRA's strength."""
    with torch.no_grad():
        net.blocks[3].conv.weight.mul_(1.5)
    group.load_weights([("blocks.3.conv.weight", net.blocks[3].conv.weight)])


def move(group, net):
    placement = place(group.placement.graph, group.plan, costs=[5.0, *[1.0] * (DEEP - 1)])
    assert placement.starts != group.placement.starts
    group.move(placement, lambda names: ((name, tensor) for name, tensor in tensors_of(net) if name in names))


def test_a_backend_that_is_not_there_is_named():
    with (
        pytest.raises(WorkerError, match="no such backend"),
        group_of(toys.chain(ToyBlock, ToyBlock, ToyBlock), backend="no such backend"),
    ):
        pass


@pytest.mark.slow
def test_inductor_differs_by_rounding():
    net = toys.chain(ToyBlock, ToyBlock, ToyBlock)
    with group_of(net, Plan(segments=2, warmup=99), backend="inductor") as group:
        group.begin(TIMESTEPS)
        found = toys.denoise(group, TIMESTEPS)
    assert (found - toys.denoise(torch.no_grad()(net), TIMESTEPS)).abs().max() < 1e-5
