"""ComfyUI's UNet together with ControlNets as one network, whose blocks the devices share out. Ranks import this, too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from comfy.cldm import cldm
from comfy.cldm.cldm import ControlNet
from comfy.controlnet import ControlBase, StrengthType
from comfy.ldm.modules import attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import nn

from .attributes import replaced

MERGE = ("strength", "strength_type", "global_average_pooling")  # what the host's merge of residuals reads
Residuals = dict[str, list[torch.Tensor | None]]


class ControlNetOnMeta(ControlNet):
    """The network of a ControlNet on the meta device. It pickles as what it is built of: union ones have a class of their own.

    Args:
        config: of the host's class.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(**config, device="meta")
        self._config = config
        self.requires_grad_(False).eval()

    def __reduce__(self) -> tuple[Any, ...]:
        return ControlNetOnMeta, (self._config,)


class ControlledUNet(UNetModel):
    """A UNet whose ``forward`` computes the residuals of its ControlNets, ``control_nets``, as well."""

    @classmethod
    def of(cls, unet: UNetModel, nets: Sequence[nn.Module]) -> ControlledUNet:
        """``unet`` itself, with ``nets``."""
        unet.__class__ = cls
        unet.control_nets = nn.ModuleList(nets)
        return unet

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        y: torch.Tensor | None = None,
        control: Residuals | None = None,
        transformer_options: dict[str, Any] | None = None,
        nets: dict[int, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The UNet's, with the residuals of ``nets`` added to ``control``.

        Args:
            nets: place in ``control_nets`` -> a call of that one: ``dtype`` of its inputs, ``merge`` (see :data:`MERGE`), and the
                arguments of its forward other than sample and timesteps, which are the UNet's. Residuals are added up in this
                order.
        """

        def merged(residuals: Residuals) -> Residuals:
            # blocks have one order of execution, whatever that of the sum is
            found = {slot: self._net(slot, x, timesteps, **nets[slot]) for slot in sorted(nets)}
            for slot, net in nets.items():
                residuals = _merger(net["merge"]).control_merge(found[slot], residuals, None)
            return residuals

        if nets:
            control = _Later(control or {}, merged)
        return super().forward(x, timesteps, context, y, control, transformer_options or {}, **kwargs)

    def _net(self, slot: int, x: torch.Tensor, timesteps: torch.Tensor, dtype: torch.dtype, merge: Any, **arguments: Any) -> Any:
        net = self.control_nets[slot]
        sample = x[:, : net.in_channels].contiguous().to(dtype)  # an inpainting model's has more
        with _traceable_attention() if x.is_meta else contextlib.nullcontext():
            return net(x=sample, timesteps=timesteps.to(dtype), **arguments)


@contextlib.contextmanager
def _traceable_attention() -> Iterator[None]:
    """An attention that runs on the meta device; ControlNets are given no options that could ask for it."""
    with contextlib.ExitStack() as stack:
        for module, name in (
            (attention, "optimized_attention"),
            (attention, "optimized_attention_masked"),
            (cldm, "optimized_attention"),
        ):
            stack.enter_context(replaced(module, name, attention.attention_pytorch))
        yield


class _Later(dict):
    """Residuals that are computed when those of the middle or output blocks are asked for the first time.

    So the UNet's first blocks are the first to run, and segments can have fresh skips at no more cost than without ControlNets.
    """

    def __init__(self, given: Residuals, merged: Callable[[Residuals], Residuals]) -> None:
        super().__init__({"input": [], "middle": [], "output": [], **given})
        self._merged: Callable[[Residuals], Residuals] | None = merged

    def __getitem__(self, name: str) -> list[torch.Tensor | None]:
        if name != "input" and self._merged is not None:
            merged, self._merged = self._merged, None
            self.update(merged(dict(self)))
        return super().__getitem__(name)


def _merger(merge: dict[str, Any]) -> ControlBase:
    """The host's own object that merges residuals, with these settings."""
    merger = ControlBase()
    for name, value in merge.items():
        setattr(merger, name, StrengthType(value) if name == "strength_type" else value)
    return merger
