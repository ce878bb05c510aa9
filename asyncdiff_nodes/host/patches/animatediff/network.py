"""A UNet of the host with the motion modules of AnimateDiff-Evolved in it. Ranks import this too."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import nn

from asyncdiff_nodes.host.patches.packs import PackModule

MODULE = "VanillaTemporalModule"  # the pack's class of motion modules

# The state of the motion modules in one call. frames: how many a batch item of the network has; length: how many the whole video
# has; window: which of its frames these are, or None; changed: name of a module with other effect or scales than 1 -> these
State = dict[str, Any]


@dataclass(frozen=True)
class MotionSource:
    """The source from which a motion model is built.

    Attributes:
        module: the pack's module with its class.
        info: the pack's facts about it: for which models it is, its format, its version.
        operations: the host's class of its layer classes.
        tensors: name, shape and dtype of each of its weights.
    """

    module: PackModule
    info: tuple[str, str, str]
    operations: type
    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]

    def build(self) -> nn.Module:
        """Build the motion model on the meta device."""
        pack = self.module.load()
        weights = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape, dtype in self.tensors}
        with torch.device("meta"):
            info = pack.AnimateDiffInfo(*self.info, mm_name="")
            model = pack.AnimateDiffModel(weights, info, {pack.InitKwargs.OPS: self.operations})
        model.load_state_dict(weights, assign=True)
        return model.requires_grad_(False).eval()


class MotionModels(nn.ModuleList):
    """The pack's motion models. They pickle as their sources, since the pack's classes cannot be imported by name."""

    def __init__(self, sources: Sequence[MotionSource]) -> None:
        super().__init__([source.build() for source in sources])
        self._sources = sources

    def __reduce__(self) -> tuple[Any, ...]:
        return MotionModels, (self._sources,)


class AnimatedUNet(UNetModel):
    """A UNet with motion models, whose modules change what some of its layers return.

    The pack puts them among these layers; here they are beside them, so that no other weight is renamed.

    Attributes:
        places: name of a layer -> names of the motion modules after it, in their order.
    """

    motion: MotionModels
    places: dict[str, tuple[str, ...]]

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor | None = None,
        context: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        control: dict[str, Any] | None = None,
        transformer_options: dict[str, Any] | None = None,
        *,
        motion: State,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run the host's, with the motion modules in the state ``motion``."""
        options = {} if transformer_options is None else transformer_options
        with self._moving(motion, context, options):
            return super().forward(x, timesteps, context, y, control, transformer_options=options, **kwargs)

    @contextlib.contextmanager
    def _moving(self, state: State, context: torch.Tensor | None, options: dict[str, Any]) -> Iterator[None]:
        """Put each motion module in its place for a while."""

        def after(modules: Sequence[nn.Module]) -> Any:
            def hook(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
                for module in modules:
                    output = module(output, context, transformer_options=options)
                return output

            return hook

        with contextlib.ExitStack() as stack:
            for place, names in self.places.items():
                modules = [self.get_submodule(name) for name in names]
                for name, module in zip(names, modules, strict=True):
                    _set(module, state, *state["changed"].get(name, (None, None)))
                stack.callback(self.get_submodule(place).register_forward_hook(after(modules)).remove)
            yield


def animated(network: UNetModel, sources: Sequence[MotionSource]) -> AnimatedUNet:
    """Add motion models built from ``sources`` to ``network``, and return it."""
    network.motion = MotionModels(sources)
    network.places = _places(network, network.motion)
    network.__class__ = AnimatedUNet
    return network


def _set(module: nn.Module, state: State, effect: Any, scales: Any) -> None:
    """Set a motion module up as the pack does before a call."""
    if not module._modules:  # a stub
        return
    module.set_video_length(state["frames"], state["length"])
    module.set_sub_idxs(state["window"])
    # masks are parameters, which are sent once; the pack asks for tensors
    module.set_effect(effect.data if isinstance(effect, torch.Tensor) else effect)
    module.set_scale(scales and [scale.data if isinstance(scale, torch.Tensor) else scale for scale in scales])
    if next(module.parameters()).is_meta:
        for block in module.temporal_transformer.transformer_blocks:
            for attention in block.attention_blocks:
                attention.actual_attention = attention_pytorch  # other attentions read a device's free memory


def _places(network: UNetModel, motion: MotionModels) -> dict[str, tuple[str, ...]]:
    """Where the pack's own code injects the modules of ``motion``; see :attr:`AnimatedUNet.places`."""
    layers = {id(layer): name for name, layer in network.named_modules()}
    names = {id(module): name for name, module in motion.named_modules(prefix="motion")}
    holder = SimpleNamespace(model=SimpleNamespace(diffusion_model=network))
    for model in motion:
        model.inject(holder)
    places: dict[str, tuple[str, ...]] = {}
    for group in (*network.input_blocks, network.middle_block, *network.output_blocks):
        place = ""
        for layer in group:
            if id(layer) in names:
                places[place] = (*places.get(place, ()), names[id(layer)])
            else:
                place = layers[id(layer)]
    for model in motion:
        model.eject(holder)
    return places
