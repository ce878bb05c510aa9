"""Whatever an input of a node is given: an error that names the input, the value and the cure, or what KSampler makes of it."""

import asyncio
import enum
import math

import nodes
import numpy as np
import pytest
import torch
from comfy_api.latest import io

from asyncdiff_nodes.engine import DeviceError, Plan, PlanError
from asyncdiff_nodes.host.checks import InputError, checked
from asyncdiff_nodes.host.routing.options import Options
from asyncdiff_nodes.nodes import AsyncDiffExtension
from helpers import small

NODES = {node.__name__: node for node in asyncio.run(AsyncDiffExtension().get_node_list())}
INPUTS = [(name, each) for name, node in NODES.items() for each in node.GET_SCHEMA().inputs]
ONE_DEVICE = Options(devices="cpu")  # so the host samples


class Two(enum.IntEnum):
    TWO = 2


PROMPT = torch.zeros(1, 77, 768)
STRANGE = [{}, {"a": 1}, [3], object(), 3j, b"3", torch.zeros(2), np.zeros(2), math, int, Plan()]
# by the kind of an input, what it does not take either: a kind that is not here has no check
WRONG = {
    "MODEL": [None, "model", 5, True, torch.nn.Linear(1, 1)],
    "INT": [None, "many", "3", "x" * 1000, 2.5, np.float32(2.5), math.nan, math.inf, []],
    "FLOAT": [None, "high", "3", "x" * 1000, 10**400, []],
    "BOOLEAN": [None, "yes", 1, 0.0],
    "COMBO": [None, "", "nothing", "x" * 1000, 3, 2.5, True, math.nan, ["euler"], np.array(["euler", "heun"])],
    "STRING": [None, 5, 2.5, True, ["red"]],
    "CONDITIONING": [
        None,
        "a cat",
        5,
        True,
        PROMPT,
        [PROMPT],
        [[]],
        [[PROMPT]],
        [[PROMPT, None]],
        [["a cat", {}]],
        [[[1.0], {}]],
    ],
    "LATENT": [None, "latent", 5, True, PROMPT, {"samples": None}, {"samples": [0.0]}, {"samples": np.zeros(2)}],
    "VAE": ["vae", 5, True],
    "ASYNCDIFF_OPTIONS": ["Balanced", "", 0, True, [], {"preset": "Fast"}, Options],
}


@pytest.fixture
def usual(sd15, prompts):
    """All inputs of a node, with values that it takes: its own defaults where it has some."""
    linked = {
        "MODEL": sd15,
        "CONDITIONING": prompts[0],
        "LATENT": small.latent(1, 8, 8),
        "VAE": None,
        "ASYNCDIFF_OPTIONS": ONE_DEVICE,
    }

    def value(each):
        kind = each.get_io_type()
        return linked[kind] if kind in linked else each.options[0] if each.default is None else each.default

    return lambda node: {each.id: value(each) for name, each in INPUTS if name == node}


@pytest.mark.parametrize(("node", "wanted"), INPUTS, ids=[f"{name}-{each.id}" for name, each in INPUTS])
def test_a_value_of_a_wrong_kind_is_named(node, wanted, usual):
    kind, name = wanted.get_io_type(), wanted.id
    of_options = node == "AsyncDiffOptions"
    error = DeviceError if name == "devices" else PlanError if of_options else InputError
    no_numbers = [True, np.True_] if of_options and kind in ("INT", "FLOAT") else []
    for value in [*WRONG[kind], *STRANGE, *no_numbers]:
        with pytest.raises(error) as raised:
            NODES[node].execute(**usual(node) | {name: value})
        said = str(raised.value)
        assert said.startswith(f"{name}={repr(value)[:16]}"), said
        assert any(f" {cure} " in said for cure in ("choose", "name", "link", "write")) and len(said) < 500, said


def test_an_input_of_a_new_kind_has_no_check_yet():
    class New(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="New", inputs=[io.Mask.Input("mask")], outputs=[])

    with pytest.raises(KeyError, match="MASK"):
        checked(New, mask=None)


@pytest.mark.parametrize(
    ("node", "given", "words"),
    [
        ("AsyncDiffKSampler", {"steps": -1}, "steps=-1 is out of range: choose 1 to 10000"),
        ("AsyncDiffCompare", {"steps": 10**30}, "steps=10+ is out of range"),
        ("AsyncDiffKSampler", {"steps": 0, "scheduler": "simple"}, "steps=0 .*scheduler=simple: choose 1 or more"),
        ("AsyncDiffKSampler", {"seed": 2**64}, "seed=18446744073709551616 is out of range: choose 0 to 18446744073709551615"),
        ("AsyncDiffKSampler", {"seed": 10**5000}, "seed=<int> is out of range"),
        ("AsyncDiffKSamplerAdvanced", {"noise_seed": -(2**64)}, "noise_seed=-18446744073709551616 is out of range"),
        ("AsyncDiffKSamplerAdvanced", {"start_at_step": -1}, "start_at_step=-1 is out of range: choose 0 to 10000"),
        ("AsyncDiffKSamplerAdvanced", {"end_at_step": -1}, "end_at_step=-1 is out of range"),
        ("AsyncDiffKSampler", {"denoise": math.nan}, "denoise=nan is out of range: choose 0.0 to 1.0"),
    ],
)
def test_what_no_sampler_can_do_is_named(node, given, words, usual):
    with pytest.raises(InputError, match=words):
        NODES[node].execute(**usual(node) | given)


FINE = [
    {"seed": np.int64(5)}, {"seed": 5.0}, {"seed": True}, {"seed": -1}, {"seed": Two.TWO}, {"seed": torch.tensor(5)},
    {"steps": np.int64(2)}, {"steps": Two.TWO}, {"steps": torch.tensor(2)}, {"steps": 0, "scheduler": "normal"},
    {"cfg": 3}, {"cfg": True}, {"cfg": np.float32(3.3)}, {"cfg": torch.tensor(3.0)}, {"cfg": -1.0}, {"cfg": 500},
    {"cfg": math.nan}, {"denoise": 1}, {"denoise": np.float16(0.5)}, {"denoise": -1}, {"denoise": math.inf},
    {"negative": []}, {"negative": ((PROMPT, {}),)}, {"negative": [[PROMPT, {}, "more"]]},
]  # fmt: skip


@pytest.mark.parametrize("given", FINE, ids=str)
def test_what_ksampler_takes_is_taken(given, usual):
    inputs = usual("AsyncDiffKSampler") | {"steps": 2, "cfg": 3.0, **given}
    found = NODES["AsyncDiffKSampler"].execute(**inputs).args[0]["samples"]
    del inputs["options"]
    assert torch.allclose(found, nodes.KSampler().sample(**inputs)[0]["samples"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("end", [10**30, 2.0, np.int64(1), Two.TWO, True])
def test_what_ksampler_advanced_takes_is_taken(end, usual):
    inputs = usual("AsyncDiffKSamplerAdvanced") | {"steps": 2, "end_at_step": end, "start_at_step": np.int64(0)}
    found = NODES["AsyncDiffKSamplerAdvanced"].execute(**inputs).args[0]["samples"]
    del inputs["options"]
    assert torch.equal(found, nodes.KSamplerAdvanced().sample(**inputs)[0]["samples"])


def test_prompts_without_a_tensor_and_nested_latents_are_taken():
    tensors = [torch.zeros(1, 4, 8, 8), torch.zeros(1, 8, 4)]
    nested = pytest.importorskip("comfy.nested_tensor").NestedTensor(tensors)  # not in 0.3
    given = {"positive": [[None, {}]], "negative": [], "latent_image": {"samples": nested, "noise_mask": None}}
    for name in ("AsyncDiffKSampler", "AsyncDiffKSamplerAdvanced", "AsyncDiffCompare"):
        assert checked(NODES[name], **given) == given


def test_numbers_of_other_libraries_are_as_good_as_pythons():
    numbers = {"segments": np.int64(2), "warmup": Two.TWO, "cooldown": torch.tensor(2), "speedup": np.float32(0)}
    plan, _ = Options("Custom", "cpu,cpu", forecast=np.True_, time_shift=np.False_, **numbers).resolve()
    assert plan == Plan(2, warmup=2, cooldown=2)
    assert type(plan.segments) is type(plan.warmup) is type(plan.cooldown) is int


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (Options("Custom", "cpu,cpu", segments=1), "segments=1 with branches=0: one segment needs 2 or more branches: choose"),
        (
            Options("Custom", "cpu,cpu", segments=1, branches=1),
            "segments=1 with branches=1: one segment needs 2 or more branches",
        ),
        (Options("Custom", "cpu,cpu", segments=1, branches=2, stride=2), "stride=2 with segments=1: take"),
        (Options("Custom", "cpu,cpu", branches=5), "stride=1 with branches=5 needs 5 devices or more, but there are 2: lower"),
        (Options("Custom", "cpu,cpu", stride=9), "stride=9 is out of range: choose 1 to 4"),
        (Options("Custom", "cpu", warmup=0), "warmup=0 is out of range: choose 1 or more"),
        (Options("Custom", "cpu", segments=-1), "segments=-1 is out of range"),
        (Options("Custom", "cpu", speedup=math.nan), "speedup=nan is out of range"),
        (Options(compression="zip", devices="cpu"), "compression='zip': choose one of none, half, int8"),
    ],
)
def test_rules_of_options_are_named(options, words):
    with pytest.raises(PlanError, match=words):
        options.resolve()
