"""What AnimateDiff-Evolved hangs on a model: its motion models, their state in a call, and what keeps the ranks from them."""

from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY

from asyncdiff_nodes.engine.planning.graph import tensors_of
from asyncdiff_nodes.host.patches.ipadapter import constant
from asyncdiff_nodes.host.patches.packs import PackModule
from asyncdiff_nodes.host.workers.memory import unload

from .network import MODULE, MotionSource, State

NOT_PLAIN = "it tells its motion modules what a rank cannot be told"
KEY = "ADE"  # the pack's things on a model
_PACK = "comfyui-animatediff-evolved.animatediff"
_MODULE, _CLASS, _INJECTION = "motion_module_ad", "AnimateDiffModel", "model_injection"
_DISPATCH = "forward_timestep_embed_patch_ade"  # its function by which the host's network calls its modules
_GROUP_NORM = "ADE_groupnormed_diffusion_model"
_OF_ALL = ("video_length", "full_length", "sub_idxs")  # attributes of motion modules
_HELD = ("view_options", "img_features", "camera_features")
# attribute of a motion model -> what has it
_MORE = {
    "img_encoder": "AnimateLCM-I2V",
    "camera_encoder": "CameraCtrl",
    "conv_in": "PIA or FancyVideo",
    "fps_embedding": "FancyVideo",
    "motion_embedding": "FancyVideo",
}


def motion_models(patcher: ModelPatcher) -> list[ModelPatcher]:
    """The motion models that the pack injects into the network of ``patcher``."""
    return patcher.additional_models.get(KEY, []) if KEY in patcher.injections else []


def is_dispatch(patch: Any) -> bool:
    """Whether this patch of a call is the pack's that has the host call its motion modules; the ranks need none for that."""
    cls, function = patch if isinstance(patch, tuple) and len(patch) == 2 else (None, None)
    return isinstance(cls, type) and _is(cls, _MODULE, MODULE) and _is(function, _INJECTION, _DISPATCH)


def obstacle(patcher: ModelPatcher, model_options: dict[str, Any]) -> str | None:
    """Why the ranks cannot have what injects modules into the network of ``patcher``, in words; None if they can."""
    others = [str(key) for key in patcher.injections if key != KEY or not _is_the_packs(patcher)]
    if others:
        return f"another node injects modules into the model: {', '.join(others)}"
    if not motion_models(patcher):
        return None
    try:
        reason = _reason(patcher, model_options)
    except AttributeError as error:
        reason = f"this version of the pack is not known ({error})"
    return reason and f"AnimateDiff-Evolved: {reason}"


def _is_the_packs(patcher: ModelPatcher) -> bool:
    """Whether what is injected under its name is the pack's."""
    injected = [function for each in patcher.injections[KEY] for function in (each.inject, each.eject)]
    classes = [type(motion.model) for motion in motion_models(patcher)]
    return all(_is(thing, _INJECTION) for thing in injected) and all(_is(cls, _MODULE, _CLASS) for cls in classes)


def _is(thing: Any, module: str, name: str | None = None) -> bool:
    """Whether a class or function is the pack's, from this module and of this name."""
    found = PackModule.of(thing)
    return found is not None and (found.pack, found.name) == (_PACK, module) and name in (None, thing.__qualname__)


def _reason(patcher: ModelPatcher, model_options: dict[str, Any]) -> str | None:
    if type(patcher.model.diffusion_model) is not UNetModel:
        return f"its motion modules are in a {type(patcher.model.diffusion_model).__name__}"
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    if _GROUP_NORM in wrappers.get(WrappersMP.DIFFUSION_MODEL, {}):
        return "with a motion model of version 1, or PIA, it changes every GroupNorm of the network"
    if any(COMPILE_KEY in keys for keys in patcher.wrappers.values()):
        return "its motion modules are in a network that another node compiles"
    for motion in motion_models(patcher):
        model = motion.model
        if found := next((what for name, what in _MORE.items() if getattr(model, name) is not None), None):
            return f"{found} is more than motion modules"
        if model.is_motionctrl_cc_enabled():
            return "MotionCtrl is more than motion modules"
        if set(model.attn_block_types) != {"Temporal_Self"} or model.get_unet_func is not _pack_of(motion).get_unet_default:
            return "this motion model is of a kind that is not known"
        if any(motion.hook_patches.values()) or motion.object_patches or motion.weight_wrapper_patches or motion.injections:
            return "another node changes its motion model"
    params = patcher.get_attachment("ADE_params")
    if params is not None:
        if any(context.view_options is not None for context in params.context_options.contexts):
            return "views within a context window are computed inside the network"
        if params.context_options.extras.context_ref is not None:
            return "ContextRef reads what the network computes inside"
    return None if Motion(patcher).state() else NOT_PLAIN


def motion_sources(patcher: ModelPatcher) -> list[MotionSource]:
    """What the motion models of ``patcher`` can be built of in another process."""
    found = []
    for motion in motion_models(patcher):
        model, info = motion.model, motion.model.mm_info
        tensors = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors_of(model))
        names = info.sd_type, info.mm_format, info.mm_version
        found.append(MotionSource(PackModule.of(type(model)), names, model.ops, tensors))
    return found


class Motion:
    """The motion models of one sampling.

    Attributes:
        patchers: the host's.
    """

    def __init__(self, patcher: ModelPatcher) -> None:
        self.patchers = motion_models(patcher)
        self._patcher = patcher
        self._kinds: dict[str, Any] = {}
        self._turns = 0
        self._modules = [
            (name, module)
            for slot, motion in enumerate(self.patchers)
            for name, module in motion.model.named_modules(prefix=f"motion.{slot}")
            if type(module).__name__ == MODULE
        ]

    def take_out(self) -> None:
        """Have the host's network without the motion modules that one of its clones put there: the host puts them back."""
        unload([self._patcher, *self.patchers], self._patcher.load_device)
        for motion in self.patchers:
            motion.model.eject(self._patcher)  # the host forgets who put them there if that clone is gone

    @property
    def frames(self) -> int:
        """How many each call of the network has of a video."""
        return self.patchers[0].model.AD_video_length

    def state(self) -> State | None:
        """What the pack has told its modules for the call that is due; None if that is not all plain data, or not alike."""
        _, first = self._modules[0]
        state = {"frames": first.video_length, "length": first.full_length, "window": first.sub_idxs, "changed": {}}
        for name, module in self._modules:
            alike = all(getattr(module, each) == getattr(first, each) for each in _OF_ALL)
            if not alike or any(getattr(module, each) is not None for each in _HELD):
                return None
            effect, scales = module.effect, _scales(module.temporal_transformer)
            if effect is not None or any(isinstance(scale, torch.Tensor) or scale != 1.0 for scale in scales):
                state["changed"][name] = [_sent(effect), list(map(_sent, scales))]
        return state

    def stream(self, state: State) -> str:
        """Equal for calls one after the other that, in states such as this, take the same path through the network."""

        def kind(value: Any) -> Any:
            return tuple(value.shape) if isinstance(value, torch.Tensor) else value == 0.0 if isinstance(value, float) else value

        kinds = {name: (kind(effect), *map(kind, scales)) for name, (effect, scales) in state["changed"].items()}
        if kinds != self._kinds:  # when they are as once before, the values of then are old
            self._kinds, self._turns = kinds, self._turns + 1
        return repr((state["frames"], state["length"], self._turns))


def _scales(transformer: Any) -> list[Any]:
    """Of its attentions' keys: a mask or a number each."""
    numbers = [1.0 if each.scale is None else each.scale for each in transformer.transformer_blocks[0].attention_blocks]
    return [number if mask is None else mask for mask, number in zip(transformer.raw_scale_masks, numbers, strict=True)]


def _sent(value: Any) -> Any:
    return constant(value) if isinstance(value, torch.Tensor) else value


def _pack_of(motion: ModelPatcher) -> Any:
    return PackModule.of(type(motion.model)).load()
