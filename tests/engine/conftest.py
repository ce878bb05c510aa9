"""Worker groups that several tests share, since a group takes seconds to start; ``begin`` makes each run a fresh one."""

import functools
import tempfile

import pytest
import torch
from diffusers import UNet2DConditionModel

import golden
import toys
from asyncdiff_nodes.engine import BlockGraph, Plan, WorkerGroup, find_family, trace

# the true architectures; see their model cards
CONFIGS = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}


@pytest.fixture(scope="session")
def true_graph():
    """Model name -> block graph at its true size, batch 2, fp16."""

    @functools.cache
    def get(name: str) -> BlockGraph:
        with torch.device("meta"):
            unet = UNet2DConditionModel(**CONFIGS[name])
        unet = unet.half().eval()
        family = find_family(unet)
        return trace(unet, family, *family.example_inputs(unet, None, 2))

    return get


@pytest.fixture(scope="session")
def running():
    """Groups by (model, plan), one thread per rank."""
    groups: dict[tuple[str, Plan], WorkerGroup] = {}
    yield groups
    for group in groups.values():
        group.close()


@pytest.fixture(scope="session")
def golden_group(running):
    """(layout, plan) -> a group of the golden UNet."""

    def get(layout: str, plan: Plan) -> WorkerGroup:
        if (layout, plan) not in running:
            devices = ["cpu"] * plan.world_size
            running[layout, plan] = WorkerGroup(golden.unet(layout), plan, devices, threads_per_rank=1)
        return running[layout, plan]

    return get


@pytest.fixture(scope="session")
def toy_group(running):
    """plan -> a group of the random network whose seed is the plan's place in ``toys.PLANS``, and that network."""

    def get(plan: Plan) -> tuple[WorkerGroup, toys.ToyNet]:
        net = toys.random_net(toys.PLANS.index(plan))
        if ("toy", plan) not in running:
            devices = ["cpu"] * plan.world_size
            running["toy", plan] = WorkerGroup(net, plan, devices, threads_per_rank=1, family=toys.TOY)
        return running["toy", plan], net

    return get


@pytest.fixture
def own_tmp(tmp_path, monkeypatch):
    """The folder in which this test's groups keep their temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path
