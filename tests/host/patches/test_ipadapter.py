"""ComfyUI_IPAdapter_plus: its attention to images is computed by the ranks that have the blocks. Adapters have random weights."""

import functools
import shutil

import pytest
import torch
from comfy.model_base import ModelType

from asyncdiff_nodes.engine.parent.rank_set import RankSet
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from helpers import packs, sampling, small
from helpers.halves import assert_halved
from helpers.sampling import EXACT, ksampler, segmented
from helpers.simulated import simulated

sample = functools.partial(ksampler, cfg=7.0, sampler="dpmpp_2m")
NAME = "ComfyUI_IPAdapter_plus"
pytestmark = packs.needs(NAME)

# the pack counts on the true layouts of blocks: these have them, with few channels
_LAYOUTS = {
    "sd15_layout": ("SD15", "BaseModel", ModelType.EPS, {
        "context_dim": 768, "num_res_blocks": [2] * 4, "channel_mult": (1, 2, 2, 2), "transformer_depth": [1] * 6 + [0] * 2,
        "transformer_depth_output": [1] * 9 + [0] * 3,
    }),
    "sdxl_layout": ("SDXL", "SDXL", ModelType.EPS, {
        "context_dim": 2048, "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 2816,
        "num_res_blocks": [2] * 3, "channel_mult": (1, 2, 2), "transformer_depth": [0, 0, 2, 2, 3, 3],
        "transformer_depth_middle": 3, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3],
    }),
}  # fmt: skip
_CHANNELS = 64
SHAPES = ((768,), (4, 768))  # of SD 1.5's layers, but for the first dimension, and of what they are made for: images
# of the attentions that the pack numbers
_WIDTHS = {"sd15_layout": [1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2], "sdxl_layout": [2] * 70}


@pytest.fixture(scope="module", autouse=True)
def layouts():
    small.VARIANTS.update(_LAYOUTS)
    small.ALL.update(_LAYOUTS)
    yield
    for name in _LAYOUTS:
        del small.VARIANTS[name], small.ALL[name]


@pytest.fixture(scope="module")
def pack():
    return packs.loaded(packs.place_of(NAME))


@pytest.fixture(scope="module")
def model(layouts):
    return small.model("sd15_layout", seed=9, channels=_CHANNELS)


def adapter(kind="sd15_layout", seed=5):
    """An IPADAPTER for images of one embedding each."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.1

    width = small.ALL[kind][3]["context_dim"]
    layers = {
        f"{2 * number + 1}.to_{what}_ip.weight": random(_CHANNELS * times, width)
        for number, times in enumerate(_WIDTHS[kind])
        for what in "kv"
    }
    projection = {"proj.weight": random(4 * width, 96), "proj.bias": random(4 * width), "norm.weight": random(width) * 10}
    return {"ip_adapter": layers, "image_proj": {**projection, "norm.bias": random(width)}}


def embeds(seed=6, images=1):
    return torch.randn(images, 96, generator=torch.Generator().manual_seed(seed))


def applied(pack, model, weights=None, node="IPAdapterEmbeds", images=1, weight_type="linear", scaling="V only", **changed):
    """``model`` that looks at an image."""
    given = {"weight": 0.8, "start_at": 0.0, "end_at": 1.0, "attn_mask": None} | changed
    return getattr(pack[node](), pack[node].FUNCTION)(
        model, weights or adapter(), embeds(6, images), weight_type=weight_type, neg_embed=embeds(7, images),
        embeds_scaling=scaling, **given,
    )[0]  # fmt: skip


def mask(count=1):
    found = torch.zeros(count, 128, 128)
    found[:, :, 64:] = 1.0
    found[0, :64] = 0.5
    return found


# what an artist may set -> how it is applied
CASES = {
    "linear": {},
    "ease in, K+V": {"weight_type": "ease in", "scaling": "K+V"},
    "style": {"weight_type": "style transfer", "scaling": "K+mean(V) w/ C penalty"},
    "precise": {"weight_type": "style transfer precise", "scaling": "K+V w/ C penalty"},
    "some steps": {"start_at": 0.3, "end_at": 0.7},
    "mask": {"attn_mask": mask()},
}


def assert_exact(model, run, devices="cpu,cpu"):
    """Bit for bit what the host computes; all ranks computed some of it."""
    found = sampling.assert_exact(model, run, Options("Exact", devices))
    assert len({record.rank for record in last_run().stats.records}) == devices.count("cpu")
    return found


@pytest.mark.parametrize(
    ("case", "devices"),
    [
        *(pytest.param(case, "cpu,cpu", marks=() if case == "mask" else pytest.mark.slow) for case in CASES),
        pytest.param("some steps", "cpu,cpu,cpu", marks=pytest.mark.slow),
    ],
)
def test_settings(pack, model, prompts, case, devices):
    patched = applied(pack, model, **CASES[case])
    found = assert_exact(patched, lambda m: sample(m, prompts), devices)
    assert (found - sample(model, prompts)).abs().max() > 1e-3, "the image matters"


@pytest.mark.slow
def test_two_images_and_batches(pack, model, prompts):
    """Two adapters on one block; an image and a mask for each latent of a batch."""
    twice = applied(pack, applied(pack, model), adapter(seed=8), weight=0.5, attn_mask=mask())
    one = assert_exact(twice, lambda m: sample(m, prompts, cfg=1.0))
    assert not torch.equal(one, sample(applied(pack, model), prompts, cfg=1.0))
    each = applied(pack, model, node="IPAdapterEmbedsBatch", images=2, attn_mask=mask(2))
    assert_exact(each, lambda m: sample(m, prompts, batch=2))


@pytest.mark.slow
def test_sdxl(pack, layouts):
    """Some of its attentions are placed layer by layer."""
    model = small.model("sdxl_layout", channels=_CHANNELS)
    prompts = small.conditioning("sdxl", 1), small.conditioning("sdxl", 2)
    patched = applied(pack, model, adapter("sdxl_layout"), start_at=0.2)
    assert_exact(patched, lambda m: sample(m, prompts), "cpu,cpu,cpu")


@pytest.mark.parametrize(
    "options",
    [
        Options(devices="cpu,cpu,cpu"),
        pytest.param(segmented(warmup=2, forecast=False), marks=pytest.mark.slow),
    ],
    ids=["balanced", "published"],
)
def test_asynchronous_steps_equal_the_simulator(pack, model, prompts, options):
    patched = applied(pack, model, end_at=0.5)

    def run(m):
        return ksampler(m, prompts, steps=8)

    found = run(attach(patched, options))
    plan = options.resolve(items=2)[0]
    assert last_run().plan == plan and not last_run().notes
    oracle, simulator = simulated(patched, plan, "euler")
    with simulator:
        expected = run(oracle)
    assert (found - expected).abs().max() <= 1e-5
    assert (found - run(patched)).abs().max() > 3e-5


def test_weights_are_sent_once_and_where_they_are_needed(pack, model, prompts, monkeypatch):
    """Each rank has those of its own blocks; the middle block's, which the pack files under another name, nobody."""
    sent, original = {}, RankSet.send

    def send(ranks, rank, header, tensors=(), **options):
        if isinstance(header, tuple) and header[0] == "call":
            sent.setdefault(rank, []).extend(tensor.double().sum().item() for tensor in tensors if tensor.shape[1:] in SHAPES)
        original(ranks, rank, header, tensors, **options)

    monkeypatch.setattr(RankSet, "send", send)
    routed = attach(applied(pack, model), EXACT)
    sample(routed, prompts)
    names = {value.double().sum().item(): name for name, value in adapter()["ip_adapter"].items()}
    found = {tuple(sorted(names[total] for total in totals if total in names)) for totals in sent.values()}
    blocks = [f"input_blocks.{i}" for i in (1, 2, 4, 5, 7, 8)] + [f"output_blocks.{i}" for i in range(3, 12)]
    expected = [
        [f"{2 * n + 1}.to_{what}_ip.weight" for n, block in enumerate(blocks) for what in "kv" if has(block, rank.weights)]
        for rank in last_run().stats.ranks
    ]
    assert found == {tuple(sorted(each)) for each in expected}
    assert len(found) == 2 and sum(map(len, found)) < 2 * 2 * len(blocks)
    assert all(len([total for total in totals if total not in names]) == 2 for totals in sent.values()), "for all blocks together"
    sent.clear()
    sample(routed, prompts)
    assert not any(sent.values()), "nor for the next picture"


def has(block, weights):
    return f"{block}.1.transformer_blocks.0.attn2.to_q.weight" in weights


@pytest.mark.slow
def test_halves_of_cfg(pack, model, prompts):
    """Each branch looks at its own prompt's image."""
    patched = applied(pack, model, attn_mask=mask())
    assert_halved(patched, lambda m: sample(m, prompts))
    assert_halved(patched, lambda m: sample(m, prompts, batch=2))
    each = applied(pack, model, node="IPAdapterEmbedsBatch", images=2, attn_mask=mask(2))
    assert_halved(each, lambda m: sample(m, prompts, batch=2))


@pytest.mark.slow
def test_latents_of_one_prompt_are_not_parted(pack, model, prompts):
    """Each has an image of its own."""
    each = applied(pack, model, node="IPAdapterEmbedsBatch", images=2)

    def run(m):
        return sample(m, prompts, cfg=1.0, batch=2)

    expected = run(each)
    found = run(attach(each, segmented(warmup=4)))
    assert (last_run().plan.branches, last_run().plan.segments) == (1, 2)
    assert torch.equal(found, expected), "no micro-batches either"


def test_other_code_is_the_hosts(pack, model, prompts, tmp_path):
    """What is not the pack's own function, and what another pack has under the same names."""
    foreign = applied(pack, model)
    patch = foreign.model_options["transformer_options"]["patches_replace"]["attn2"]["output", 3]
    patch.add(lambda out, *_, **__: out * 0.1, **patch.kwargs[0])
    other = applied(packs.loaded(shutil.copytree(packs.place_of(NAME), tmp_path / "another_pack")), model)
    for patched in (foreign, other):
        expected = sample(patched, prompts)
        assert torch.equal(sample(attach(patched, EXACT), prompts), expected)
        assert last_run().stats is None and "CrossAttentionPatch.Attn2Replace" in last_run().notes[0]
