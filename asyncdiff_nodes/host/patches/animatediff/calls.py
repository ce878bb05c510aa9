"""AnimateDiff-Evolved on a model: its motion models, their state in a call, and reasons why ranks cannot compute them."""

from __future__ import annotations

from typing import Any

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import nn

from asyncdiff_nodes.engine import UnsupportedModelError
from asyncdiff_nodes.engine.tensors import tensors_of
from asyncdiff_nodes.host.patches.compiled import is_compiled
from asyncdiff_nodes.host.patches.ipadapter import constant
from asyncdiff_nodes.host.patches.packs import PackModule
from asyncdiff_nodes.host.patches.protocol import PatchInSampling, RoutedCall, RoutedPatch
from asyncdiff_nodes.host.workers.comparison import compare
from asyncdiff_nodes.host.workers.memory import unload

from .network import MODULE, MotionSource, State, animated

_NOT_PLAIN = "its motion modules have settings that a rank cannot get"
_KEY = "ADE"  # the pack's key on a model
_PACK = "comfyui-animatediff-evolved.animatediff"
_MODULE, _CLASS, _INJECTION = "motion_module_ad", "AnimateDiffModel", "model_injection"
_DISPATCH = "forward_timestep_embed_patch_ade"  # its function with which the host's network calls its modules
_GROUP_NORM = "ADE_groupnormed_diffusion_model"
_OF_ALL = ("video_length", "full_length", "sub_idxs")  # attributes of motion modules
_HELD = ("view_options", "img_features", "camera_features")
# attribute of a motion model -> the kind that has it
_MORE = {
    "img_encoder": "AnimateLCM-I2V",
    "camera_encoder": "CameraCtrl",
    "conv_in": "PIA or FancyVideo",
    "fps_embedding": "FancyVideo",
    "motion_embedding": "FancyVideo",
}


class AnimateDiff(RoutedPatch):
    """The motion models that the pack injects into a network."""

    def obstacle(self, patcher: ModelPatcher, model_options: dict[str, Any]) -> str | None:
        """See :class:`RoutedPatch`."""
        if not _motion_models(patcher):
            return None
        try:
            reason = _reason(patcher, model_options)
        except AttributeError as error:
            reason = f"this version of the pack is unknown ({error})"
        return reason and f"AnimateDiff-Evolved: {reason}"

    def injects(self, patcher: ModelPatcher, key: str) -> bool:
        """See :class:`RoutedPatch`."""
        return key == _KEY and _is_the_packs(patcher)

    def is_needless(self, patch: Any) -> bool:
        """Whether ``patch`` is the pack's code that makes the host call motion modules; the ranks' network does so by itself."""
        cls, function = patch if isinstance(patch, tuple) and len(patch) == 2 else (None, None)
        return isinstance(cls, type) and _is(cls, _MODULE, MODULE) and _is(function, _INJECTION, _DISPATCH)

    def models(self, patcher: ModelPatcher) -> dict[str, ModelPatcher]:
        """See :class:`RoutedPatch` and :class:`~.network.AnimatedUNet`."""
        return {f"motion.{slot}.": motion for slot, motion in enumerate(_motion_models(patcher))}

    def identity(self, patcher: ModelPatcher) -> tuple[MotionSource, ...]:
        """See :class:`RoutedPatch`."""
        return tuple(_motion_sources(patcher))

    def build(self, network: nn.Module, patcher: ModelPatcher) -> nn.Module:
        """See :class:`RoutedPatch`."""
        sources = _motion_sources(patcher)
        if not sources:
            return network
        try:
            network = animated(network, sources)
        except Exception as error:
            raise UnsupportedModelError(f"its motion model could not be rebuilt ({error})") from error
        for rebuilt, live in zip(network.motion, _motion_models(patcher), strict=True):
            compare(rebuilt, live.model, "its file says")
        return network

    def begin(self, patcher: ModelPatcher) -> PatchInSampling | None:
        """See :class:`RoutedPatch`."""
        return Motion(patcher) if _motion_models(patcher) else None


def _motion_models(patcher: ModelPatcher) -> list[ModelPatcher]:
    return patcher.additional_models.get(_KEY, []) if _KEY in patcher.injections else []


def _is_the_packs(patcher: ModelPatcher) -> bool:
    """Whether the injection under the pack's name is really the pack's."""
    injected = [function for each in patcher.injections[_KEY] for function in (each.inject, each.eject)]
    classes = [type(motion.model) for motion in _motion_models(patcher)]
    return all(_is(thing, _INJECTION) for thing in injected) and all(_is(cls, _MODULE, _CLASS) for cls in classes)


def _is(thing: Any, module: str, name: str | None = None) -> bool:
    """Whether a class or function is the pack's, from this module and of this name."""
    own = PackModule.of(thing)
    return own is not None and (own.pack, own.name) == (_PACK, module) and name in (None, thing.__qualname__)


def _reason(patcher: ModelPatcher, model_options: dict[str, Any]) -> str | None:
    if type(patcher.model.diffusion_model) is not UNetModel:
        return f"its motion modules are in a {type(patcher.model.diffusion_model).__name__}"
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {})
    if _GROUP_NORM in wrappers.get(WrappersMP.DIFFUSION_MODEL, {}):
        return "with a motion model of version 1, or PIA, it changes every GroupNorm of the network"
    if is_compiled(patcher):
        return "its motion modules are in a network that another node compiles"
    for motion in _motion_models(patcher):
        model = motion.model
        if thing := next((what for name, what in _MORE.items() if getattr(model, name) is not None), None):
            return f"{thing} does more than run motion modules"
        if model.is_motionctrl_cc_enabled():
            return "MotionCtrl does more than run motion modules"
        if set(model.attn_block_types) != {"Temporal_Self"} or model.get_unet_func is not _pack_of(motion).get_unet_default:
            return "this kind of motion model is unknown"
        if any(motion.hook_patches.values()) or motion.object_patches or motion.weight_wrapper_patches or motion.injections:
            return "another node changes its motion model"
    params = patcher.get_attachment("ADE_params")
    if params is not None:
        if any(context.view_options is not None for context in params.context_options.contexts):
            return "views within a context window are computed inside the network"
        if params.context_options.extras.context_ref is not None:
            return "ContextRef reads values inside the network"
    return None if Motion(patcher).state() else _NOT_PLAIN


def _motion_sources(patcher: ModelPatcher) -> list[MotionSource]:
    """The sources from which another process can build the motion models of ``patcher``."""
    sources = []
    for motion in _motion_models(patcher):
        model, info = motion.model, motion.model.mm_info
        tensors = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors_of(model))
        names = info.sd_type, info.mm_format, info.mm_version
        sources.append(MotionSource(PackModule.of(type(model)), names, model.ops, tensors))
    return sources


class Motion(PatchInSampling):
    """The motion models of one sampling."""

    only_ranks = True  # to compute a call, the host puts the motion modules into its network for good

    def __init__(self, patcher: ModelPatcher) -> None:
        self._models = _motion_models(patcher)
        self._patcher = patcher
        self._kinds: dict[str, Any] = {}
        self._turns = 0
        self._modules = [
            (name, module)
            for slot, motion in enumerate(self._models)
            for name, module in motion.model.named_modules(prefix=f"motion.{slot}")
            if type(module).__name__ == MODULE
        ]

    def prepare(self) -> None:
        """Take the motion modules of a clone of the model out of the host's network; the host puts them back when needed."""
        unload([self._patcher, *self._models], self._patcher.load_device)
        for motion in self._models:
            motion.model.eject(self._patcher)  # the host forgets who put them there if that clone is gone

    def shape(self, latent: list[int]) -> list[int]:
        """The shape with as many frames as each call of the network has of a video."""
        return [self._models[0].model.AD_video_length, *latent[1:]]

    def before(self, call: RoutedCall) -> str | None:
        """Send the state of the motion modules."""
        call.repeatable = False
        state = self.state()
        if state is None:
            return f"AnimateDiff-Evolved: {_NOT_PLAIN}"
        call.arguments["motion"] = state
        call.path.append(self._stream(state))
        return None

    def state(self) -> State | None:
        """The settings of the pack's modules for the current call; None if they are not plain data, or not alike."""
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

    def _stream(self, state: State) -> str:
        """A text that is equal for consecutive calls whose states let them take the same path through the network."""

        def kind(value: Any) -> Any:
            return tuple(value.shape) if isinstance(value, torch.Tensor) else value == 0.0 if isinstance(value, float) else value

        kinds = {name: (kind(effect), *map(kind, scales)) for name, (effect, scales) in state["changed"].items()}
        if kinds != self._kinds:  # if they become what they once were, the values from then are old
            self._kinds, self._turns = kinds, self._turns + 1
        return repr((state["frames"], state["length"], self._turns))


def _scales(transformer: Any) -> list[Any]:
    """A mask or a number for the keys of each of its attentions."""
    numbers = [1.0 if each.scale is None else each.scale for each in transformer.transformer_blocks[0].attention_blocks]
    return [number if mask is None else mask for mask, number in zip(transformer.raw_scale_masks, numbers, strict=True)]


def _sent(value: Any) -> Any:
    return constant(value) if isinstance(value, torch.Tensor) else value


def _pack_of(motion: ModelPatcher) -> Any:
    return PackModule.of(type(motion.model)).load()
