"""ComfyUI-AnimateDiff-Evolved: its motion modules are further blocks of the ranks. Motion models have random weights."""

import itertools
import shutil

import comfy.patcher_extension
import comfy.sample
import comfy.sd
import comfy.utils
import folder_paths
import pytest
import test_ipadapter
import test_sag
import test_tome
import torch
from comfy.model_base import ModelType

from asyncdiff_nodes.host.choices import ALWAYS
from asyncdiff_nodes.host.page import progress
from asyncdiff_nodes.host.page.report import last_run
from asyncdiff_nodes.host.patches.obstacles import obstacle
from asyncdiff_nodes.host.patches.packs import PackModule
from asyncdiff_nodes.host.routing.hooks import attach
from asyncdiff_nodes.host.workers.pool import POOL
from helpers import packs, sampling, small
from helpers.controlling import controlled
from helpers.halves import assert_halved
from helpers.sampling import ksampler
from helpers.simulated import assert_simulated

NAME = "ComfyUI-AnimateDiff-Evolved"
pytestmark = packs.needs(NAME)

# the true layout of blocks, with few channels
_LAYOUT = ("SD15", "BaseModel", ModelType.EPS, {
    "context_dim": 768, "num_res_blocks": [2] * 4, "channel_mult": (1, 2, 4, 4), "transformer_depth": [1] * 6 + [0] * 2,
    "transformer_depth_output": [1] * 9 + [0] * 3,
})  # fmt: skip
_WIDTHS = {"(320, 640, 1280, 1280)": "(32, 64, 128, 128)", "self.middle_channel = 1280": "self.middle_channel = 128"}
# name of a motion model -> how it is made
_MADE = {
    "v3": {}, "other": {"seed": 4}, "v2": {"middle": True}, "lcm": {"middle": True, "positions": 0}, "v1": {"positions": 24},
}  # fmt: skip
FRAMES = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the pack for networks with as few channels, whose motion models are beside it."""
    place = shutil.copytree(packs.place_of(NAME), tmp_path_factory.mktemp("packs") / NAME)
    source = place / "animatediff" / "motion_module_ad.py"
    text = source.read_text()
    for true, few in _WIDTHS.items():
        assert text.count(true) == 1
        text = text.replace(true, few)
    source.write_text(text)
    return place


@pytest.fixture(scope="module")
def pack(folder):
    found = packs.loaded(folder)
    models = folder.parent / "models"
    models.mkdir()
    folder_paths.add_model_folder_path("animatediff_models", str(models))
    for name, made in _MADE.items():
        comfy.utils.save_torch_file(motion_weights(found, **made), str(models / f"{name}.safetensors"))
    folder_paths.add_model_folder_path("animatediff_motion_lora", str(models))
    comfy.utils.save_torch_file(motion_lora(found), str(models / "lora.safetensors"))
    return found


@pytest.fixture(scope="module")
def model():
    small.VARIANTS["sd15_layout"] = small.ALL["sd15_layout"] = _LAYOUT
    yield small.model("sd15_layout", seed=9, channels=32)
    POOL.release()
    del small.VARIANTS["sd15_layout"], small.ALL["sd15_layout"]


def motion_weights(pack, seed=3, middle=False, positions=32):
    """The file of a motion model for the copy's widths; with no ``positions`` in AnimateLCM's format."""
    module = PackModule.of(pack["ADE_UseEvolvedSampling"])
    source = PackModule(module.package, module.folder, "motion_module_ad").load()
    stages = ["down_blocks.3", "up_blocks.3", *(["mid_block"] if middle else [])]
    last = "motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.1.pos_encoder.pe"
    keys = [f"{stage}.{last}" for stage in stages]
    info = source.AnimateDiffInfo("SD1.5", "AnimateDiff", "v3", "random")
    made = source.AnimateDiffModel({key: torch.zeros(1, positions or 64, 1) for key in keys}, info)
    small.randomise(made, seed)
    return {name: weight for name, weight in made.state_dict().items() if positions or "pos_encoder" not in name}


def motion_lora(pack, rank=2):
    """The file of a motion LoRA for the copy's widths."""
    generator, found = torch.Generator().manual_seed(6), {}
    for name, weight in motion_weights(pack).items():
        if name.endswith(".to_v.weight"):
            base = name.replace("to_v.weight", "processor.to_v_lora")
            found[f"{base}.down.weight"] = torch.randn(rank, weight.shape[1], generator=generator)
            found[f"{base}.up.weight"] = torch.randn(weight.shape[0], rank, generator=generator)
    return found


def animated(pack, model, name="v3", context=None, settings=None, **motion_settings):
    """``model`` with a motion model, by the pack's Gen2 nodes."""
    motion = small.node(pack["ADE_LoadAnimateDiffModel"], f"{name}.safetensors")
    motions = pack["ADE_ApplyAnimateDiffModel"]().apply_motion_model(motion, **motion_settings)[0]
    return pack["ADE_UseEvolvedSampling"]().use_evolved_sampling(model, "autoselect", motions, context, settings)[0]


def sample(model, prompts, frames=FRAMES, steps=3, cfg=4.0, size=8):
    return ksampler(model, prompts, small.latent(frames, size, size), steps=steps, cfg=cfg)


def segmented(ranks, **changed):
    return sampling.segmented(ranks, **{"warmup": ALWAYS} | changed)


def assert_exact(model, prompts, ranks=2, routed=None, **kwargs):
    """Bit for bit what the host computes; it was routed."""
    found = sampling.assert_exact(model, lambda m: sample(m, prompts, **kwargs), segmented(ranks), routed)
    assert last_run().plan.segments == ranks
    return found


def pids():
    return {rank.pid for rank in last_run().stats.ranks}


def streams():
    return {record.stream for record in last_run().stats.records}


CASES = [("v3", 3), ("v2", 2), ("v2", 3), ("lcm", 2), ("lcm", 3)]


@pytest.mark.covers("exact", kind="animatediff")
@pytest.mark.parametrize(("name", "ranks"), [("v3", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES)])
def test_synchronous_calls_are_the_hosts_bit_by_bit(pack, model, prompts, name, ranks):
    found = assert_exact(animated(pack, model, name), prompts, ranks)
    assert (found - sample(model, prompts)).abs().max() > 1e-2, "motion matters"


@pytest.mark.covers("sharded", kind="animatediff")
def test_each_rank_has_the_motion_modules_that_it_owns(pack, model, prompts):
    moving = animated(pack, model)
    assert_exact(moving, prompts)
    placement, (motion,) = POOL._held[-1].group.placement, moving.additional_models["ADE"]
    names = {f"motion.0.{name}" for name in motion.model.state_dict()}
    for rank, report in enumerate(last_run().stats.ranks):
        owned = tuple(f"{placement.graph.names[index]}." for index in placement.owned(rank))
        found = {name for name in report.weights if name.startswith("motion.")}
        assert found == {name for name in names if name.startswith(owned)} and 0 < len(found) < len(names)


@pytest.mark.covers("async", kind="animatediff")
@pytest.mark.parametrize(
    ("ranks", "forecast"), [(2, True), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, False), (3, True)))]
)
def test_asynchronous_calls_equal_the_simulator(pack, model, prompts, ranks, forecast):
    moving, options = animated(pack, model), segmented(ranks, warmup=2, forecast=forecast)
    assert_simulated(moving, options, lambda m: sample(m, prompts, steps=8))


@pytest.mark.slow
def test_the_frames_of_a_video_are_not_parted(pack, model, prompts):
    """Not even for somebody who asks for more branches than there are videos."""
    moving = animated(pack, model)
    expected = sample(moving, prompts, cfg=1.0)
    found = sample(attach(moving, segmented(2, segments=1, branches=2)), prompts, cfg=1.0)
    assert last_run().plan.branches == 2 and last_run().stats.records and torch.equal(found, expected)


@pytest.mark.slow
def test_halves_of_cfg(pack, model, prompts):
    """Each branch has the whole video of its own prompt."""
    moving = animated(pack, model, effect_multival=mask(2 * FRAMES))
    assert_halved(moving, lambda m: sample(m, prompts))


def mask(frames=FRAMES):
    """Of more frames than the video has, the first count."""
    found = torch.ones(frames, 8, 8)
    found[1:, :, 4:] = 0.3
    return found


def keyframes(pack):
    first = pack["ADE_AnimateDiffKeyframe"]().load_keyframe(0.0, effect_multival=0.7)[0]
    return pack["ADE_AnimateDiffKeyframe"]().load_keyframe(0.5, first, scale_multival=mask(), effect_multival=1.2)[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["masks", "numbers", "keyframes", "some steps"])
def test_settings_of_motion(pack, model, prompts, case):
    settings = {
        "numbers": {"effect_multival": 0.6, "scale_multival": 1.3},
        "masks": {"effect_multival": mask(), "scale_multival": 1.0 + mask()},
        "keyframes": {"ad_keyframes": keyframes(pack)},
        "some steps": {"start_percent": 0.1, "end_percent": 0.6},
    }[case]
    found = assert_exact(animated(pack, model, **settings), prompts, steps=5)
    assert (found - sample(animated(pack, model), prompts, steps=5)).abs().max() > 1e-3
    assert len(streams()) == (2 if case == "keyframes" else 3 if case == "some steps" else 1)


def test_each_window_of_frames_is_a_stream(pack, model, prompts):
    context = small.node(pack["ADE_StandardStaticContextOptions"], FRAMES, 2)
    found = assert_exact(animated(pack, model, context=context), prompts, frames=6)
    assert len(streams()) == 2
    assert (found[:2] - sample(animated(pack, model), prompts, frames=6)[:2]).abs().max() > 1e-3


@pytest.mark.slow
def test_windows_without_motion(pack, model, prompts):
    """The pack's sampling serves other models, too."""
    context = small.node(pack["ADE_StandardStaticContextOptions"], FRAMES, 2)
    windowed = pack["ADE_UseEvolvedSampling"]().use_evolved_sampling(model, "autoselect", None, context)[0]
    assert_exact(windowed, prompts, frames=6)
    assert len(streams()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("fuse", ["pyramid", "relative"])
def test_windows_that_go_round(pack, model, prompts, fuse):
    context = small.node(pack["ADE_LoopedUniformContextOptions"], FRAMES, 1, 2, True, fuse)
    assert_exact(animated(pack, model, context=context), prompts, frames=7, steps=8)
    assert len(streams()) > 8 and progress.current.posted == 8
    assert len(POOL._held[-1].group._streams) < 0.5 * len(streams()), "those of the last two steps"


@pytest.mark.covers("lora", kind="animatediff")
@pytest.mark.slow
def test_other_weights_go_to_the_same_ranks(pack, model, prompts):
    """A LoRA of the network, and one of the motion model; another motion model of the same format."""
    plain = assert_exact(animated(pack, model), prompts)
    ranks = pids()
    lora = small.node(pack["ADE_AnimateDiffLoRALoader"], "lora.safetensors", 0.8)
    patched = assert_exact(animated(pack, model, motion_lora=lora), prompts)
    other = assert_exact(animated(pack, model, "other"), prompts)
    trained = comfy.sd.load_lora_for_models(model, None, small.lora(model), 0.8, 0)[0]
    both = assert_exact(animated(pack, trained, motion_lora=lora), prompts)
    assert pids() == ranks
    found = [plain, patched, other, both]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(found, 2))
    assert torch.equal(assert_exact(animated(pack, model), prompts), plain)


@pytest.mark.slow
def test_with_and_without_motion(pack, model, prompts):
    """Whoever had the network before, its modules are in it once, or not at all."""
    moving = animated(pack, model)
    early = attach(moving, segmented(2))
    expected, plain = sample(moving, prompts), sample(model, prompts)
    assert not torch.equal(expected, plain)
    for loaded in (model, moving, moving):
        sample(loaded, prompts)
        assert torch.equal(sample(early, prompts), expected) and last_run().stats.records
    assert torch.equal(sample(moving, prompts), expected)
    assert torch.equal(assert_exact(model, prompts), plain)


@pytest.mark.slow
def test_ways_to_apply_it(pack, model, prompts):
    """By the Gen1 node, twice, and to a model that is routed already."""
    gen1 = pack["ADE_AnimateDiffLoaderGen1"]().load_mm_and_inject_params(model, "v3.safetensors", "autoselect")[0]
    assert torch.equal(assert_exact(gen1, prompts), assert_exact(animated(pack, model), prompts))
    assert_exact(animated(pack, model), prompts, routed=animated(pack, attach(model, segmented(2))))
    first = pack["ADE_ApplyAnimateDiffModel"]().apply_motion_model(
        small.node(pack["ADE_LoadAnimateDiffModel"], "v2.safetensors"), effect_multival=0.5
    )[0]
    assert_exact(animated(pack, model, prev_m_models=first), prompts)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_samplings_of_one_node(pack, model, prompts, first):
    """FreeInit samples several times, within our hook or around it."""
    free = pack["ADE_IterationOptsFreeInit"]().create_iter_opts(2, "butterworth", 0.25, 0.25, 4, 999, False, "DinkInit_v1")[0]
    settings = pack["ADE_AnimateDiffSamplingSettings"]().create_settings(0, "default", "comfy", 0, iteration_opts=free)[0]
    expected = sample(animated(pack, model, settings=settings), prompts)
    if first == "ours":
        routed = animated(pack, attach(model, segmented(2)), settings=settings)
    else:
        routed = attach(animated(pack, model, settings=settings), segmented(2))
    assert torch.equal(sample(routed, prompts), expected)
    assert last_run().stats.records and not last_run().notes


@pytest.mark.slow
def test_a_control_net_is_the_hosts(pack, model, prompts):
    moving = animated(pack, model)
    given = controlled(prompts, small.control_net("sd15_layout", channels=32))
    given = [[[entry[0][0], entry[0][1]]] for entry in given]
    expected = sample(moving, given)
    assert torch.equal(sample(attach(moving, segmented(2)), given), expected)
    assert "further modules, such as AnimateDiff's" in last_run().notes[0] and last_run().stats.records


@pytest.mark.slow
@packs.needs(test_ipadapter.NAME)
def test_with_an_image(pack, model, prompts, monkeypatch):
    """IPAdapter's patches are told the pack's windows."""
    monkeypatch.setitem(test_ipadapter._WIDTHS, "sd15_layout", [1, 1, 2, 2, 4, 4, 4, 4, 4, 2, 2, 2, 1, 1, 1, 4])
    monkeypatch.setattr(test_ipadapter, "_CHANNELS", 32)
    images = packs.loaded(packs.place_of(test_ipadapter.NAME))
    context = small.node(pack["ADE_StandardStaticContextOptions"], FRAMES, 2)
    moving = animated(pack, model, context=context)
    shown = test_ipadapter.applied(images, moving, node="IPAdapterEmbedsBatch", images=6)
    found = assert_exact(shown, prompts, frames=6)
    assert (found - sample(moving, prompts, frames=6)).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("changed", [test_sag.guided, test_tome.merging])
def test_patches_that_the_host_must_know_of(pack, model, prompts, changed):
    """The sampler asks what one saw, and another draws the host's random numbers."""
    moving = animated(pack, model)
    patched, routed = changed(moving), attach(changed(moving), sampling.EXACT)
    found = assert_exact(patched, prompts, routed=routed, size=32)
    assert not torch.equal(found, sample(moving, prompts, size=32))


@pytest.mark.slow
def test_a_run_goes_on_without_its_ranks(pack, model, prompts):
    """The host then needs the motion model itself."""
    moving, latent = animated(pack, model), small.latent(FRAMES, 8, 8)["samples"]
    expected = sample(moving, prompts)

    def take_back(step, *_):
        if step == 0:
            POOL.release()

    noise = comfy.sample.prepare_noise(latent, 5)
    routed = attach(moving, segmented(2))
    found = comfy.sample.sample(routed, noise, 3, 4.0, "euler", "normal", *prompts, latent, callback=take_back, seed=5)
    assert "took the ranks' memory back" in last_run().notes[0]
    assert torch.equal(found, expected)
    assert_exact(moving, prompts)


def another_injection(pack, model):
    clone = animated(pack, model)
    nothing = comfy.patcher_extension.PatcherInjection(inject=lambda _: None, eject=lambda _: None)
    clone.set_injections("theirs", [nothing])
    return clone


def views(pack, model):
    seen = small.node(pack["ADE_StandardStaticViewOptions"], 2, 1)
    context = pack["ADE_StandardStaticContextOptions"]().create_options(FRAMES, 2, view_opts=seen)[0]
    return animated(pack, model, context=context)


@pytest.mark.parametrize(
    ("make", "frames", "reason"),
    [
        (lambda pack, model: animated(pack, model, "v1"), FRAMES, "it changes every GroupNorm of the network"),
        (another_injection, FRAMES, "another node injects modules into the model: theirs"),
        (views, 6, "views within a context window are computed inside the network"),
    ],
    ids=["v1", "injection", "views"],
)
def test_what_is_more_than_motion_modules_is_the_hosts_by_name(pack, model, prompts, make, frames, reason):
    changed = make(pack, model)
    expected = sample(changed, prompts, frames)
    assert torch.equal(sample(attach(changed, segmented(2)), prompts, frames), expected)
    assert last_run().stats is None and reason in last_run().notes[0]


@pytest.mark.parametrize(
    ("part", "reason"), [("camera_encoder", "CameraCtrl"), ("img_encoder", "AnimateLCM-I2V"), ("conv_in", "PIA or FancyVideo")]
)
def test_parts_that_are_refused(pack, model, part, reason):
    moving = animated(pack, model)
    setattr(moving.additional_models["ADE"][0].model, part, torch.nn.Identity())
    assert obstacle(moving, moving.model_options) == f"AnimateDiff-Evolved: {reason} does more than run motion modules"
