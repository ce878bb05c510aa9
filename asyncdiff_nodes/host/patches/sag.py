"""Self-Attention Guidance: what its patch saw inside the network goes back to the host with the network's result.

Its node hangs a patch on one attention, in the middle block, and blurs the sampler's picture where that attended to. Here the
block hands what the patch saw on beside its own output, so that it crosses as any other value does: exact in a synchronous call,
one call old in an asynchronous one. Ranks import this, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, SpatialTransformer, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import nn

from asyncdiff_nodes.models.comfy.unet import block_names

from .by_reference import ShippedPatch

_MODULE, _VARIABLE = "comfy_extras.nodes_sag", "attn_scores"
_KIND, _PLACE = "attn1", ("middle", 0, 0)  # of the node's patch
_TRANSFORMER, _LAYER = "middle_block.1", "transformer_blocks.0"
_COND, _UNCOND = 0, 1  # in the host's lists of what a batch is for


@dataclass(frozen=True)
class Attention:
    """The node's patch by reference, in a call of which the sampler asks nothing."""

    patch: ShippedPatch

    @staticmethod
    def of(patch: ShippedPatch, transformer_options: dict[str, Any]) -> Attention | None:
        """What stands for ``patch`` in a call with these options; None if it is another node's."""
        if patch.module != _MODULE:
            return None
        return (RecordedAttention if _UNCOND in transformer_options.get("cond_or_uncond", ()) else Attention)(patch)

    @staticmethod
    def runs_in(network: nn.Module) -> bool:
        """Whether ``network`` has the attention that the node means, and calls it once."""
        has_middle = type(network) is UNetModel and network.middle_block is not None and len(network.middle_block) > 1
        return has_middle and type(network.middle_block[1]) is SpatialTransformer

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        """Run the patch."""
        if q.is_meta:  # the host's attention may look at a device's free memory
            return attention_pytorch(q, k, v, extra_options["n_heads"])
        return self.patch(q, k, v, {**extra_options, "cond_or_uncond": [_COND]})


class RecordedAttention(Attention):
    """The same in a call that has negative prompts: the sampler will ask what it saw of them."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        """Run the patch. It keeps what it sees of all prompts in this part of the call."""
        return self.patch(q, k, v, {**extra_options, "cond_or_uncond": [_UNCOND]})

    def take(self, batch: int) -> torch.Tensor:
        """How much each token was attended to, [B, 1, T]: all that the sampler makes of the [B * heads, T, T] that it saw."""
        cell = dict(self.patch.settings)[_VARIABLE].cell
        seen, cell.cell_contents = cell.cell_contents, None
        return seen.unflatten(0, (batch, -1)).mean(1).sum(1, keepdim=True)


class _Guide:
    """A block whose ``forward`` returns, in calls where the node's patch records, what that saw after its own output."""

    def forward(self, x: torch.Tensor, context: Any = None, transformer_options: dict[str, Any] | None = None) -> Any:
        """The host's."""
        options = {} if transformer_options is None else transformer_options
        output, patch = super().forward(x, context, options), _recorded(options)
        return output if patch is None else (output, patch.take(len(output)))


class GuideTransformer(_Guide, SpatialTransformer):
    """A transformer that is placed as a whole."""


class GuideLayer(_Guide, BasicTransformerBlock):
    """A layer of a deep one."""


class GuidedUNet(UNetModel):
    """A UNet that returns what its guide tells after its own output, if it has one.

    Attributes:
        guide: name of the block with the attention that the node's patch is for.
    """

    guide: str

    def forward(self, *args: Any, transformer_options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        """The host's."""
        options = {} if transformer_options is None else transformer_options
        if _recorded(options) is None:
            return super().forward(*args, transformer_options=options, **kwargs)
        told: list[torch.Tensor] = []

        def take(_: nn.Module, __: Any, output: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            told.append(output[1])
            return output[0]

        hook = self.get_submodule(self.guide).register_forward_hook(take)  # after those of whoever looks at blocks
        try:
            return super().forward(*args, transformer_options=options, **kwargs), *told
        finally:
            hook.remove()


_GUIDES = {SpatialTransformer: GuideTransformer, BasicTransformerBlock: GuideLayer}


def guided(network: UNetModel) -> UNetModel:
    """``network`` itself, that tells what the node's patch saw."""
    if type(network) is UNetModel:  # other classes that ranks have are built on it
        network.__class__ = GuidedUNet
    attention = f"{_TRANSFORMER}.{_LAYER}."
    network.guide = next(name for name in block_names(network) if attention.startswith(f"{name}."))
    block = network.get_submodule(network.guide)
    block.__class__ = _GUIDES[type(block)]
    return network


def _recorded(transformer_options: dict[str, Any]) -> RecordedAttention | None:
    patch = transformer_options.get("patches_replace", {}).get(_KIND, {}).get(_PLACE)
    return patch if isinstance(patch, RecordedAttention) else None


def patch_of(transformer_options: dict[str, Any]) -> Callable[..., Any] | None:
    """The node's own patch among the host's options of a call, or of a model; None if it is not there."""
    patch = transformer_options.get("patches_replace", {}).get(_KIND, {}).get(_PLACE)
    return patch if getattr(patch, "__module__", None) == _MODULE else None


def example_options(patch: Callable[..., Any]) -> dict[str, Any]:
    """Options of a call in which ``patch``, the node's own, records: as ranks are sent them."""
    options = {"cond_or_uncond": [_UNCOND]}
    return {"patches_replace": {_KIND: {_PLACE: Attention.of(ShippedPatch.of(patch, {}), options)}}, **options}


def give_back(transformer_options: dict[str, Any], result: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Tell the node's own patch what it would have seen in a call with these options; the network's output."""
    output, scores = result
    prompts, patch = transformer_options["cond_or_uncond"], patch_of(transformer_options)
    own = scores.tensor_split(len(prompts))[prompts.index(_UNCOND)]
    patch.__closure__[patch.__code__.co_freevars.index(_VARIABLE)].cell_contents = own
    return output
