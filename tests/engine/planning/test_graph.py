"""The trace finds the true blocks, edges and costs, without touching a weight."""

import re

import pytest
import torch
from diffusers import UNet2DConditionModel

import golden
import toys
from asyncdiff_nodes.engine import Family, PlanError, UnsupportedModelError, find_family, meta_copy, trace
from toys import ToyBlock, ToyNet


def toy_graph(net, family=toys.TOY, batch=2):
    skeleton = meta_copy(net)
    return trace(skeleton, family, *family.example_inputs(skeleton, None, batch))


@pytest.mark.parametrize(("model", "gmacs"), [("sd15", 803.3), ("sd21", 2149.1), ("sdxl", 6761.2)])
def test_macs_of_true_models(true_graph, model, gmacs):
    assert true_graph(model).macs / 1e9 == pytest.approx(gmacs, abs=0.1)


def test_glue_is_a_negligible_part_of_the_work(true_graph):
    graph = true_graph("sdxl")
    assert 0 < graph.glue_macs < 0.001 * graph.macs


@pytest.mark.parametrize("layout", golden.LAYOUTS)
def test_blocks_are_in_the_order_in_which_the_model_runs_them(layout):
    unet = golden.unet(layout)
    family = find_family(unet)
    ran, hooks = [], []
    for name in family.block_names(unet):
        hooks.append(unet.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name)))
    with torch.no_grad():
        latents = golden.inputs(layout)["latents"]
        unet(torch.cat([latents, latents]), 1, **golden.conditioning(layout))
    for hook in hooks:
        hook.remove()
    skeleton = meta_copy(unet)
    graph = trace(skeleton, family, *family.example_inputs(skeleton, None, 2))
    assert graph.names == tuple(ran)
    assert set(ran) == set(family.block_names(unet))


def test_edges_of_the_sd15_layout_are_the_chain_and_the_skips_of_a_unet():
    unet = golden.unet("sd15")
    skeleton = meta_copy(unet)
    family = find_family(unet)
    graph = trace(skeleton, family, *family.example_inputs(skeleton, None, 2))
    last = {name: i for i, name in enumerate(graph.names)}
    chain = {(i, i + 1) for i in range(len(graph.blocks) - 1)}
    # a UNet stacks conv_in, the end of each down layer and each downsampler, and its up resnets take them off again
    stack = ["conv_in"]
    for stage in range(4):
        layers = "attentions" if stage < 3 else "resnets"
        stack += [f"down_blocks.{stage}.{layers}.{i}" for i in range(2)]
        stack += [f"down_blocks.{stage}.downsamplers.0"] if stage < 3 else []
    skips = {(last[stack.pop()], last[f"up_blocks.{stage}.resnets.{i}"]) for stage in range(4) for i in range(3)}
    assert not stack
    assert graph.edges == chain | skips


def test_output_layouts_are_those_of_the_real_blocks():
    unet = golden.unet("sd15").to(memory_format=torch.channels_last)
    try:
        family, seen, hooks = find_family(unet), {}, []
        for name in family.block_names(unet):
            hooks.append(unet.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out})))
        latents = golden.inputs("sd15")["latents"]
        args, kwargs = (torch.cat([latents, latents]), 1), golden.conditioning("sd15")
        with torch.no_grad():
            unet(*args, **kwargs)
        for hook in hooks:
            hook.remove()
        for block in trace(meta_copy(unet), family, args, kwargs).blocks:
            value = seen[block.name][0] if isinstance(seen[block.name], tuple) else seen[block.name]
            (meta,) = block.outputs
            assert (meta.shape, meta.dtype) == (tuple(value.shape), value.dtype)
            assert block.output_bytes == value.numel() * 4
            if block.name != "conv_norm_out":  # group norms answer in another layout on a GPU than on a CPU
                assert meta.stride == value.stride()
    finally:
        unet.to(memory_format=torch.contiguous_format)


def test_no_weight_is_read_or_allocated(true_graph):
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(golden.MANIFEST["layouts"]["sd15"]["config"])
    skeleton = meta_copy(unet)
    assert all(tensor.is_meta for tensor in [*skeleton.parameters(), *skeleton.buffers()])
    family = find_family(unet)
    graph = trace(skeleton, family, *family.example_inputs(skeleton, None, 2))
    assert sum(b.weight_bytes for b in graph.blocks) + graph.glue_bytes == sum(p.nbytes for p in unet.parameters())


def test_meta_copy_leaves_the_module_alone():
    net = toys.random_net(0)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    skeleton = meta_copy(net)
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())
    assert skeleton.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("seed", range(5))
def test_edges_of_random_networks(seed):
    net = toys.random_net(seed)
    depth = len(net.blocks)
    expected = {(i, i + 1) for i in range(depth - 1)}
    for reader, sources in net.skips.items():
        # what the output reads, the last block is charged with
        expected |= {(source, min(reader, depth - 1)) for source in sources}
    assert toy_graph(net).edges == {(a, b) for a, b in expected if a != b}


class Overwriting(toys.ToyBlock):
    def forward(self, x, emb, context):
        return x.copy_(super().forward(x, emb, context))


class InPlace(toys.ToyNet):
    """Adds its context to a part of what block 1 returns, and writes some of that to its own input."""

    def forward(self, sample, timestep, context, doubled=False):
        emb, x = self.embed(sample, timestep), sample
        for index, block in enumerate(self.blocks):
            x = block(x, emb, torch.zeros(1, device=x.device))
            if index == 1:
                x[:, 1:] += context.mean()
                sample.view(-1)[:4].copy_(x.flatten()[:4])
        return x + sample


def test_what_is_written_through_a_view_is_read_by_what_comes_after():
    net = InPlace([toys.ToyBlock(4, 3), toys.ToyBlock(4, 3), Overwriting(4, 3), toys.ToyBlock(4, 3)])
    args = torch.zeros(2, 4, 8, 8), 1, torch.ones(2, 3)
    graph = trace(meta_copy(net), toys.TOY, args, {})
    assert graph.edges == {(0, 1), (1, 2), (2, 3), (1, 3)}
    assert [2 in block.reads for block in graph.blocks] == [False, False, True, True]


def test_a_forward_that_looks_at_values_is_refused():
    class Choosy(toys.ToyNet):
        def forward(self, sample, timestep, context, doubled=False):
            return super().forward(sample[sample[:, 0, 0, 0] > 0], timestep, context)

    args = torch.zeros(2, 4, 80, 80), 1, torch.ones(2, 3)  # too large to be computed while planning
    with pytest.raises(UnsupportedModelError, match="depends on values, not shapes alone"):
        trace(meta_copy(Choosy([toys.ToyBlock(4, 3)])), toys.TOY, args, {})


def test_macs_and_bytes_of_a_toy_are_the_ones_counted_by_hand():
    net = ToyNet([ToyBlock(4, 3), ToyBlock(4, 1, pair=True)])
    graph = toy_graph(net, batch=3)
    assert [b.macs for b in graph.blocks] == [3 * (64 * 16 * 9 + 8 * 4), 3 * (64 * 16 + 8 * 4)]
    assert [b.weight_bytes for b in graph.blocks] == [4 * (144 + 4 + 32 + 4 + 1), 4 * (16 + 4 + 32 + 4 + 1)]
    assert [b.output_bytes for b in graph.blocks] == [4 * 3 * 4 * 64, 4 * 3 * 5 * 64]
    assert graph.glue_macs == 3 * 2 * 8
    assert graph.glue_bytes == 4 * (16 + 8 + 1)


def test_prefix_means_the_first_block_under_it(true_graph):
    graph = true_graph("sd15")
    assert graph.names[graph.find("up_blocks.1")] == "up_blocks.1.resnets.0"
    assert graph.names[graph.find("up_blocks.1.attentions.1")] == "up_blocks.1.attentions.1"
    with pytest.raises(PlanError, match=r"unknown cut 'up_blocks.1.att'.*conv_in"):
        graph.find("up_blocks.1.att")


def nested(net):
    return [*toys.block_names(net), "blocks.0.conv"]


def test_nested_block_is_refused():
    family = Family("Nested", nested, toys.TOY.timestep, toys.TOY.example_inputs)
    with pytest.raises(UnsupportedModelError, match=re.escape("block blocks.0.conv lies within another block")):
        toy_graph(toys.random_net(0), family)


def test_block_that_runs_twice_is_refused():
    net = toys.chain(ToyBlock, ToyBlock)
    net.blocks.append(net.blocks[0])
    family = Family("Twice", lambda net: ["blocks.0", "blocks.1"], toys.TOY.timestep, toys.TOY.example_inputs)
    with pytest.raises(UnsupportedModelError, match=re.escape("block blocks.0 runs more than once")):
        toy_graph(net, family)


def test_model_without_a_block_list_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match=r"no block list for a .*ToyNet; listed: .*UNet2DConditionModel"):
        find_family(toys.random_net(0))


class Video(torch.nn.Module):
    """Two 3D convolutions, as ``convolve`` does them."""

    def __init__(self, convolve):
        super().__init__()
        self.convolve = convolve
        self.blocks = torch.nn.ModuleList(torch.nn.Conv3d(4, 4, 3, padding=1, bias=False) for _ in range(2))
        for block in self.blocks:
            block.forward = lambda x, block=block: self.convolve(x, block)

    def forward(self, x, t):
        for block in self.blocks:
            x = block(x)
        return x


def graph_of_video(convolve):
    family = Family("Video", lambda net: ["blocks.0", "blocks.1"], timestep=(1, "t"), example_inputs=None, sample=(0, "x"))
    with torch.device("meta"):
        return trace(Video(convolve), family, (torch.empty(1, 4, 5, 8, 8), 0), {})


def cudnn(x, block):
    return torch.cudnn_convolution(x, block.weight, (1, 1, 1), (1, 1, 1), (1, 1, 1), 1, False, False, allow_tf32=True)


def test_cudnns_convolution_is_traced_as_the_usual_one():
    usual = graph_of_video(lambda x, block: torch.nn.Conv3d.forward(block, x))
    assert graph_of_video(cudnn) == usual and usual.blocks[0].macs == 4 * 4 * 27 * 5 * 8 * 8


@pytest.fixture
def opaque():
    """An operator of somebody else's that says nothing of its result's shape."""
    library = torch.library.Library("asyncdiff_test", "FRAGMENT")
    library.define("opaque(Tensor x) -> Tensor")
    library.impl("opaque", torch.clone, "CPU")
    yield torch.ops.asyncdiff_test.opaque
    library._destroy()


def test_an_operator_without_a_meta_kernel_is_named(opaque):
    with pytest.raises(UnsupportedModelError, match="asyncdiff_test::opaque, an operator of which PyTorch cannot tell"):
        graph_of_video(lambda x, block: opaque(x))
    mine = torch.library.custom_op("asyncdiff_test::mine", lambda x: x.clone(), mutates_args=(), schema="(Tensor x) -> Tensor")
    with pytest.raises(UnsupportedModelError, match="asyncdiff_test::mine, an operator"):
        graph_of_video(lambda x, block: mine(x))
