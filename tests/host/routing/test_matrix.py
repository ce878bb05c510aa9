"""What is routed, and what the host samples as usual and why: every row of the table in docs/comfyui.md, on real nodes.

The picture is the stock one in either case.
"""

import importlib.util
import random
import re
from pathlib import Path

import comfy.hooks
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from comfy_extras import (
    nodes_differential_diffusion,
    nodes_easycache,
    nodes_freelunch,
    nodes_hypertile,
    nodes_model_advanced,
    nodes_model_downscale,
    nodes_model_merging,
    nodes_pag,
    nodes_perpneg,
    nodes_sag,
    nodes_tomesd,
    nodes_torch_compile,
)

from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.routing.options import Options
from helpers import small
from helpers.sampling import EXACT, banded, ksampler, segmented

DOCS = Path(__file__).resolve().parents[3] / "docs" / "comfyui.md"


def compiled(backend):
    return lambda model: small.node(nodes_torch_compile.TorchCompileModel, model, backend)


def replaced_module(model):
    clone = model.clone()
    clone.add_object_patch("diffusion_model.out", model.model.diffusion_model.out)
    return clone


def injected(model):
    clone = model.clone()
    nothing = comfy.patcher_extension.PatcherInjection(inject=lambda _: None, eject=lambda _: None)
    clone.set_injections("motion", [nothing])
    return clone


def layers_of_another_pack(model):
    class Linear(comfy.ops.disable_weight_init.Linear):  # in this function, where no other process can find it
        pass

    changed = small.model("sd15", seed=9)
    for layer in changed.model.diffusion_model.modules():
        if type(layer) is comfy.ops.disable_weight_init.Linear:
            layer.__class__ = Linear
    return changed


def hooked(prompts):
    keys = small.lora(small.model("sd15"))
    hook = comfy.hooks.create_hook_lora(keys, 0.5, 0.0)
    return comfy.hooks.set_hooks_for_conditioning(prompts[0], hook), prompts[1]


def gligen_like(model):
    clone = model.clone()
    clone.set_model_patch(lambda *args: args[0], "middle_patch")
    return clone


def attention_override(model):
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = lambda attention, *a, **k: attention(*a, **k)
    return clone


# the table: what the artist uses -> the model it makes, and what the note says where it is not routed
ROUTED = None
ROWS = {
    "FreeU": (lambda m: small.node(nodes_freelunch.FreeU, m, 1.1, 1.2, 0.9, 0.2), ROUTED),
    "FreeU_V2": (lambda m: small.node(nodes_freelunch.FreeU_V2, m, 1.3, 1.4, 0.9, 0.2), ROUTED),
    "PerturbedAttentionGuidance": (lambda m: small.node(nodes_pag.PerturbedAttentionGuidance, m, 3.0), ROUTED),
    "NAGuidance": (lambda m: small.node(importlib.import_module("comfy_extras.nodes_nag").NAGuidance, m, 3.0, 0.5, 2.0), ROUTED),
    "PerpNeg": (lambda m: small.node(nodes_perpneg.PerpNeg, m, small.conditioning("sd15", 7), 1.0), ROUTED),
    "RescaleCFG": (lambda m: small.node(nodes_model_advanced.RescaleCFG, m, 0.7), ROUTED),
    "ModelSamplingDiscrete": (
        lambda m: small.node(nodes_model_advanced.ModelSamplingDiscrete, m, "v_prediction", True),
        ROUTED,
    ),
    "ModelComputeDtype": (lambda m: small.node(nodes_model_advanced.ModelComputeDtype, m, "bf16"), ROUTED),
    "ModelMergeSimple": (
        lambda m: small.node(nodes_model_merging.ModelMergeSimple, m, small.model("sd15", seed=12), 0.4),
        ROUTED,
    ),
    "ModelAttentionBackend": (lambda m: small.node(nodes_model_advanced.ModelAttentionBackend, m, "pytorch attention"), ROUTED),
    "DifferentialDiffusion": (lambda m: small.node(nodes_differential_diffusion.DifferentialDiffusion, m), ROUTED),
    "EasyCache": (lambda m: small.node(nodes_easycache.EasyCacheNode, m, 0.2, 0.15, 0.95, False), ROUTED),
    "LazyCache": (lambda m: small.node(nodes_easycache.LazyCacheNode, m, 0.2, 0.15, 0.95, False), ROUTED),
    "SelfAttentionGuidance": (lambda m: small.node(nodes_sag.SelfAttentionGuidance, m, 0.5, 2.0), ROUTED),
    "HyperTile": (lambda m: small.node(nodes_hypertile.HyperTile, m, 64, 2, 1, False), ROUTED),
    "HyperTile, swap_size above 2": (lambda m: small.node(nodes_hypertile.HyperTile, m, 32, 3, 0, False), "nodes_hypertile"),
    "TomePatchModel": (lambda m: small.node(nodes_tomesd.TomePatchModel, m, 0.3), ROUTED),
    "PatchModelAddDownscale": (
        lambda m: small.node(nodes_model_downscale.PatchModelAddDownscale, m, 1, 2.0, 0.0, 0.35, True, "bicubic", "bicubic"),
        "nodes_model_downscale",
    ),
    "TorchCompileModel": (compiled("eager"), ROUTED),
    "TorchCompileModel, CUDA graphs": (compiled("cudagraphs"), "compiled (torch.compile) with CUDA graphs"),
    "replaced network modules": (replaced_module, "another node replaced diffusion_model.out"),
    "injected modules": (injected, "another node injects modules into the model: motion"),
    "layers of another pack's classes": (layers_of_another_pack, "a worker process cannot rebuild these"),
    "attention overrides": (attention_override, "optimized_attention_override"),
    "other patches inside the network": (gligen_like, "test_matrix.gligen_like"),
}


def sample(model, prompts, steps=4):
    torch.manual_seed(0)  # for what draws random numbers of its own
    return ksampler(model, prompts, steps=steps, cfg=7.0)


if importlib.util.find_spec("comfy_extras.nodes_nag") is None:  # a host older than this node
    del ROWS["NAGuidance"]
if not hasattr(nodes_model_advanced, "ModelAttentionBackend"):
    del ROWS["ModelAttentionBackend"]
SLOW = (
    "FreeU_V2",
    "LazyCache",
    "ModelComputeDtype",
    "PatchModelAddDownscale",
    "PerturbedAttentionGuidance",
    "SelfAttentionGuidance",
    "TomePatchModel",
    "TorchCompileModel",
    "TorchCompileModel, CUDA graphs",
)


@pytest.mark.parametrize("feature", [pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in ROWS])
def test_picture_is_the_stock_one(sd15, prompts, feature):
    change, reason = ROWS[feature]
    model = change(sd15)
    routed = attach(model, EXACT)
    random.seed(0)
    expected = sample(model, prompts)
    random.seed(0)
    found = sample(routed, prompts)
    assert expected.isfinite().all()
    assert torch.equal(found, expected)
    if reason is ROUTED:
        assert last_run().stats is not None and not last_run().notes
    else:
        assert last_run().stats is None
        assert reason in last_run().notes[0]
    # attached before the other node, the result is the same
    random.seed(0)
    assert torch.equal(sample(change(attach(sd15, EXACT)), prompts), expected)


# routed but in bands, since they change what attentions or blocks see, and may look at all rows
PATCHED = {
    "FreeU", "FreeU_V2", "HyperTile", "NAGuidance", "PerturbedAttentionGuidance", "SelfAttentionGuidance", "TomePatchModel",
}  # fmt: skip


FAST_IN_BANDS = ("FreeU", "PerpNeg", "ModelAttentionBackend")


@pytest.mark.parametrize("feature", [f if f in FAST_IN_BANDS else pytest.param(f, marks=pytest.mark.slow) for f in ROWS])
def test_picture_in_bands_is_the_stock_one_up_to_rounding(sd15, prompts, feature):
    change, reason = ROWS[feature]
    model = change(sd15)
    random.seed(0)
    expected = sample(model, prompts)
    random.seed(0)
    found = sample(attach(model, banded(branches=1)), prompts)
    difference = (found - expected).abs().max() / expected.abs().max()
    if reason is ROUTED and feature not in PATCHED:
        assert last_run().stats is not None and not last_run().notes
        assert difference <= (5e-3 if feature == "ModelComputeDtype" else 1e-4)  # the former computes in bfloat16
    else:
        assert (reason or "other nodes have put patches into its layers") in last_run().notes[0]
        # the prompts are called without the patch by some guidances, and then routed
        assert difference <= (1e-4 if feature == "PerturbedAttentionGuidance" else 0.0)
        assert (last_run().stats is not None) == (feature == "PerturbedAttentionGuidance")
        assert (feature == "PerturbedAttentionGuidance") != last_run().line.startswith("ComfyUI sampled as usual: ")


def test_weight_hooks(sd15, prompts):
    pair = hooked(prompts)
    expected = sample(sd15, pair)
    assert not torch.equal(expected, sample(sd15, prompts))
    assert torch.equal(sample(attach(sd15, EXACT), pair), expected)
    assert "weight hooks" in last_run().notes[0]


def test_only_the_patched_calls_run_on_the_host(sd15, prompts):
    """A guidance that adds a patched call of its own to each step leaves the others routed."""

    def weaker(q, k, v, extra_options, mask=None):
        return v * 0.5

    def guide(args):
        options = comfy.model_patcher.set_model_options_patch_replace(args["model_options"].copy(), weaker, "attn1", "middle", 0)
        (other,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"] + (args["cond_denoised"] - other) * 2.0

    guided = sd15.clone()
    guided.set_model_sampler_post_cfg_function(guide)
    expected = sample(guided, prompts)
    assert torch.equal(sample(attach(guided, EXACT), prompts), expected)
    assert len({record.call for record in last_run().stats.records}) == 4
    assert "attn1 (test_matrix.test_only_the_patched_calls_run_on_the_host)" in last_run().notes[0]


def test_calls_that_a_cache_leaves_out(sd15, prompts):
    """The others are still worked ahead for."""
    model = attach(ROWS["EasyCache"][0](sd15), segmented())
    assert ksampler(model, prompts, steps=12).isfinite().all()
    calls = {record.call for record in last_run().stats.records}
    assert max(calls) >= 10 and len(calls) < 12, "or nothing was left out"
    assert not last_run().notes and last_run().plan.forecast == 1


@pytest.mark.parametrize("devices", ["auto", "cpu"])
def test_one_device_is_the_hosts_own_path(sd15, prompts, devices, caplog):
    expected = sample(sd15, prompts)
    assert torch.equal(sample(attach(sd15, Options(devices=devices)), prompts), expected)
    assert last_run().stats is None
    assert [r for r in caplog.records if "AsyncDiff: not used" in r.message].__len__() == 1
    assert "device" in last_run().line


def test_table_in_the_docs():
    """docs/comfyui.md has a row for every feature tested here, with the right verdict."""
    rows = dict(re.findall(r"^\| `?([^|`]+?)`? \| (routed|as usual)", DOCS.read_text(), re.MULTILINE))
    verdicts = {name: "routed" if reason is ROUTED else "as usual" for name, (_, reason) in ROWS.items()}
    missing = {name: verdict for name, verdict in verdicts.items() if rows.get(name) != verdict}
    assert not missing


@pytest.mark.timing
@pytest.mark.slow
def test_the_ranks_compile_their_blocks_once(sd15, prompts):
    """Not for each step: what a block is told of the sampling must not count as news."""
    model = attach(compiled("inductor")(sd15), segmented(warmup=2))
    expected, found = sample(attach(sd15, EXACT), prompts, steps=8), sample(model, prompts, steps=8)
    record = last_run()
    assert not record.notes
    assert 0 < (found - expected).abs().max() < 1e-3 * expected.abs().max()
    seconds = {rank: [r.compute for r in record.stats.records if r.rank == rank] for rank in (0, 1)}
    for times in seconds.values():
        assert max(times[4:]) < 0.1 * max(times), "compiled in the first calls only"
