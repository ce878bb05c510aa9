"""What is found in transformers is cut where lists of blocks were, and as many bytes cross. The numbers are of these lists."""

import pytest
import torch

from asyncdiff_nodes.cli.example_calls import example_call
from asyncdiff_nodes.cli.zoo import find_model
from asyncdiff_nodes.engine import Plan, find_family, place, trace
from asyncdiff_nodes.engine.planning.discovery import discover

# of two segments: the block that the second one begins with, and bytes per call; positions of sample and timestep; list of blocks
# -> its length, and where these hand the hidden states on; multiply-accumulates of all
TRANSFORMERS = {
    "pixart": ("transformer_blocks.14", 18874368, (0, 2), {"transformer_blocks": (28, 0)}, 6509523566592),
    "flux": (
        "single_transformer_blocks.9", 56623104, (0, 3), {"transformer_blocks": (19, 1), "single_transformer_blocks": (38, 1)},
        74384653418496,
    ),
    "qwen-image": ("transformer_blocks.30", 51904512, (0, 3), {"transformer_blocks": (60, 1)}, 70576604971008),
    "wan-14b": ("blocks.20", 670924800, (0, 1), {"blocks": (40, 0)}, 1678370283192320),
    "hunyuan-video": (
        "single_transformer_blocks.10", 1462960128, (0, 1),
        {"transformer_blocks": (20, 0), "single_transformer_blocks": (40, 0)}, 12068592207003648,
    ),
    "ltx-video": ("transformer_blocks.14", 60555264, (0, 2), {"transformer_blocks": (28, 0)}, 37129045409792),
    "sd35-large": ("transformer_blocks.19", 43085312, (0, 3), {"transformer_blocks": (38, 1)}, 31121114907648),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", ["pixart", *(pytest.param(name, marks=pytest.mark.slow) for name in TRANSFORMERS if name != "pixart")]
)
def test_a_transformer_has_the_same_cuts_and_bytes(name):
    cut, nbytes, places, lists, macs = TRANSFORMERS[name]
    skeleton = find_model(name).skeleton(torch.float16)
    family, graph = discover(skeleton, *example_call(skeleton))
    assert [f"{items}.{index}" for items, (count, _) in lists.items() for index in range(count)] == [
        block for block in graph.names if block.rpartition(".")[0] in lists
    ]
    assert graph.macs == macs and 0 < graph.glue_macs < 0.0083 * macs, "stems and heads"
    assert (family.sample, family.timestep) == ((places[0], "hidden_states"), (places[1], "timestep"))
    assert family.hidden.argument == (0, "hidden_states")
    assert family.hidden.lists == {items: at for items, (_, at) in lists.items()}
    placement = place(graph, Plan())
    assert len(placement.incoming(1)) == 1, "the stream of hidden states"
    assert placement.cuts[1] == cut and placement.bytes_per_call == nbytes


def test_a_unet_is_better_with_its_list():
    """Its resamplers and first convolution have too little work to be found; without them more bytes cross in plain reuse."""
    skeleton = find_model("sd15").skeleton(torch.float16)
    call, plan = example_call(skeleton), Plan(forecast=0)
    listed, found = trace(skeleton, find_family(skeleton), *call), discover(skeleton, *call)[1]
    assert place(found, plan).bytes_per_call > 1.1 * place(listed, plan).bytes_per_call
