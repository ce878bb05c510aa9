"""A network of the host and its ControlNets as one network, whose blocks the devices share. Ranks import this too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from comfy.cldm import cldm, mmdit
from comfy.controlnet import ControlBase, StrengthType
from comfy.ldm.flux import controlnet as flux_controlnet
from comfy.ldm.flux import math as flux_math
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules import attention
from comfy.ldm.modules.diffusionmodules import mmdit as mmdit_network
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.qwen_image import controlnet as qwen_controlnet
from comfy.ldm.qwen_image import model as qwen_network
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from torch import nn

from asyncdiff_nodes.host.attributes import layers_with_weights, replaced
from asyncdiff_nodes.host.workers.banded import is_in_bands

MERGE = ("strength", "strength_type", "global_average_pooling")  # the settings that the host's merge of residuals reads
Residuals = dict[str, list[torch.Tensor | None]]
# modules where the blocks of ControlNets look up the host's attention
_WITH_ATTENTION = (attention, cldm, flux_math, mmdit_network, qwen_network)


class ControlNetOnMeta(cldm.ControlNet):
    """The network of a UNet's ControlNet on the meta device.

    It pickles as its configuration, since union ControlNets have a class of their own.

    Args:
        config: the arguments of the host's class.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        with layers_with_weights():
            super().__init__(**config)
        self._config = config
        self.requires_grad_(False).eval()

    def __reduce__(self) -> tuple[Any, ...]:
        return ControlNetOnMeta, (self._config,)


class Controlled:
    """A network of the host whose ``forward`` also computes the residuals of its ControlNets, ``control_nets``.

    Attributes:
        net_class: the class of these ControlNets.
        residuals: the kinds of residuals that they return.
    """

    net_class: ClassVar[type[nn.Module]]
    residuals: ClassVar[frozenset[str]]
    control_nets: nn.ModuleList

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor | None = None,
        timesteps: torch.Tensor | None = None,
        control: Residuals | None = None,
        nets: dict[int, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run the host's, adding the residuals of ``nets`` to ``control`` when the network asks for the first of them.

        Args:
            timestep, timesteps: the host's classes have either name.
            nets: place in ``control_nets`` -> a call of that one: ``channels`` of the sample that it reads, ``merge`` (see
                :data:`MERGE`), and the arguments of its forward other than sample and timesteps, which are the network's.
                Residuals are added up in this order.
        """
        times = timesteps if timestep is None else timestep
        # ControlNets get no options that could ask for one
        pytorch = x.is_meta or is_in_bands(kwargs.get("transformer_options"))

        def merged(residuals: Residuals) -> Residuals:
            # blocks need one order of execution, whatever the order of the sum
            with _pytorch_attention() if pytorch else contextlib.nullcontext():
                computed = {slot: self._net(slot, x, times, **nets[slot]) for slot in sorted(nets)}
            for slot, net in nets.items():
                residuals = _merger(net["merge"]).control_merge(computed[slot], residuals, None)
            return residuals

        if nets:
            control = _Later(control or {}, self.residuals, merged)
        return super().forward(x, times, control=control, **kwargs)

    def _net(self, slot: int, x: torch.Tensor, timesteps: torch.Tensor, channels: int, merge: Any, **arguments: Any) -> Residuals:
        sample = x[:, :channels].contiguous()  # an inpainting model's latent has more channels
        return self.control_nets[slot](x=sample, timesteps=timesteps.to(x.dtype), **arguments)


class ControlledUNet(Controlled, UNetModel):
    """A UNet."""

    net_class = cldm.ControlNet
    residuals = frozenset({"middle", "output"})


class ControlledFlux(Controlled, Flux):
    """FLUX.1."""

    net_class = flux_controlnet.ControlNetFlux
    residuals = frozenset({"input", "output"})


class ControlledSD3(Controlled, OpenAISignatureMMDITWrapper):
    """SD 3."""

    net_class = mmdit.ControlNet
    residuals = frozenset({"output"})


class ControlledQwenImage(Controlled, QwenImageTransformer2DModel):
    """Qwen-Image."""

    net_class = qwen_controlnet.QwenImageControlNetModel
    residuals = frozenset({"input"})


# the host's class -> the same with ControlNets
CONTROLLED: dict[type[nn.Module], type[Controlled]] = {
    UNetModel: ControlledUNet,
    Flux: ControlledFlux,
    OpenAISignatureMMDITWrapper: ControlledSD3,
    QwenImageTransformer2DModel: ControlledQwenImage,
}


def controlled(network: nn.Module, nets: Sequence[nn.Module]) -> nn.Module:
    """Add ``nets`` to ``network``, and return it."""
    network.__class__ = CONTROLLED[type(network)]
    network.control_nets = nn.ModuleList(nets)
    return network


@contextlib.contextmanager
def _pytorch_attention() -> Iterator[None]:
    """Use PyTorch's attention, which runs on the meta device and is seen in bands."""
    with contextlib.ExitStack() as stack:
        for module in _WITH_ATTENTION:
            for name in {"optimized_attention", "optimized_attention_masked"} & vars(module).keys():
                stack.enter_context(replaced(module, name, attention.attention_pytorch))
        yield


class _Later(dict):
    """Residuals that are computed when the network first asks for one of these ``kinds``.

    So its own first blocks run first, and segments can have fresh skips at no more cost than without ControlNets.
    """

    def __init__(self, given: Residuals, kinds: frozenset[str], merged: Callable[[Residuals], Residuals]) -> None:
        super().__init__({"input": [], "middle": [], "output": [], **given})
        self._kinds = kinds
        self._merged: Callable[[Residuals], Residuals] | None = merged

    def __getitem__(self, name: str) -> list[torch.Tensor | None]:
        if name in self._kinds and self._merged is not None:
            merged, self._merged = self._merged, None
            self.update(merged(dict(self)))
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """The list ``name``, the way transformers ask; there is one of every kind."""
        return self[name]


def _merger(merge: dict[str, Any]) -> ControlBase:
    """The host's own object that merges residuals, with these settings."""
    merger = ControlBase()
    for name, value in merge.items():
        setattr(merger, name, StrengthType(value) if name == "strength_type" else value)
    return merger
