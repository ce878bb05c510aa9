"""Self-Attention Guidance: the host gets what its patch saw inside the network together with the network's result.

The node puts a patch on one attention, in the middle block, and blurs the sampler's picture where the network attended to. Here
the block returns what the patch saw beside its own output. This is sent like any other value: exact in a synchronous call,
one call old in an asynchronous one. Ranks import this too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock, SpatialTransformer, attention_pytorch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from torch import nn

from asyncdiff_nodes.engine import UnsupportedModelError
from asyncdiff_nodes.models.comfy.unet import block_names

from .by_reference import ShippedPatch, Variable
from .compiled import is_compiled
from .protocol import PatchInSampling, RoutedCall, RoutedPatch

_MODULE, _VARIABLE = "comfy_extras.nodes_sag", "attn_scores"
_KIND, _PLACE = "attn1", ("middle", 0, 0)  # of the node's patch
_TRANSFORMER, _LAYER = "middle_block.1", "transformer_blocks.0"
_COND, _UNCOND = 0, 1  # in the host's lists of the prompts of a batch


@dataclass(frozen=True)
class Attention:
    """The node's patch by reference, in a call that the sampler does not ask about."""

    patch: ShippedPatch

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        """Run the patch."""
        if q.is_meta:  # the host's attention may read a device's free memory
            return attention_pytorch(q, k, v, extra_options["n_heads"])
        return self.patch(q, k, v, {**extra_options, "cond_or_uncond": [_COND]})


class RecordedAttention(Attention):
    """The same in a call with negative prompts: the sampler will ask what the patch saw of them."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        """Run the patch. It keeps what it sees of all prompts in this part of the call."""
        return self.patch(q, k, v, {**extra_options, "cond_or_uncond": [_UNCOND]})

    def take(self, batch: int) -> torch.Tensor:
        """How much each token was attended to, [B, 1, T]; the sampler uses nothing else of the [B * heads, T, T] seen."""
        cell = dict(self.patch.settings)[_VARIABLE].cell
        seen, cell.cell_contents = cell.cell_contents, None
        return seen.unflatten(0, (batch, -1)).mean(1).sum(1, keepdim=True)


class _Guide:
    """A block whose ``forward`` returns its output and, in calls that the node's patch records, what the patch saw."""

    def forward(self, x: torch.Tensor, context: Any = None, transformer_options: dict[str, Any] | None = None) -> Any:
        """Run the host's, and add what the patch saw."""
        options = {} if transformer_options is None else transformer_options
        output, patch = super().forward(x, context, options), _recorded(options)
        return output if patch is None else (output, patch.take(len(output)))


class GuideTransformer(_Guide, SpatialTransformer):
    """A transformer that is placed as a whole."""


class GuideLayer(_Guide, BasicTransformerBlock):
    """A layer of a deep transformer."""


_GUIDES = {SpatialTransformer: GuideTransformer, BasicTransformerBlock: GuideLayer}


def guided(network: UNetModel) -> UNetModel:
    """Make ``network`` return what its guide tells after its own output, and return the network."""
    attention = f"{_TRANSFORMER}.{_LAYER}."
    network.guide = next(name for name in block_names(network) if attention.startswith(f"{name}."))
    network.telling = None
    block = network.get_submodule(network.guide)
    block.__class__ = _GUIDES[type(block)]
    network.register_forward_pre_hook(_begin_telling, with_kwargs=True)
    network.register_forward_hook(_end_telling, with_kwargs=True, always_call=True)
    return network


def _begin_telling(network: UNetModel, _: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Begin a call of ``network``: if the patch records in it, take from the guide what the guide tells."""
    if _recorded(kwargs.get("transformer_options") or {}) is None:
        return
    told: list[torch.Tensor] = []

    def take(_: nn.Module, __: Any, output: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        told.append(output[1])
        return output[0]

    # after the hooks of code that watches blocks
    network.telling = network.get_submodule(network.guide).register_forward_hook(take), told


def _end_telling(network: UNetModel, _: tuple[Any, ...], __: dict[str, Any], output: Any) -> Any:
    """End the call, also if it failed, and add what the guide told."""
    if network.telling is None:
        return output
    (hook, told), network.telling = network.telling, None
    hook.remove()
    return (output, *told)


def _recorded(transformer_options: dict[str, Any]) -> RecordedAttention | None:
    patch = transformer_options.get("patches_replace", {}).get(_KIND, {}).get(_PLACE)
    return patch if isinstance(patch, RecordedAttention) else None


def _patch_of(transformer_options: dict[str, Any]) -> Callable[..., Any] | None:
    """The node's own patch among the host's options of a call, or of a model; None if it is not there."""
    patch = transformer_options.get("patches_replace", {}).get(_KIND, {}).get(_PLACE)
    return patch if getattr(patch, "__module__", None) == _MODULE else None


def _hung_on(patcher: ModelPatcher) -> Callable[..., Any] | None:
    """The node's patch on the model of ``patcher``; None if it has none."""
    return _patch_of(patcher.model_options.get("transformer_options", {}))


class SelfAttentionGuidance(RoutedPatch):
    """The patch of *Self-Attention Guidance*."""

    def shipped(self, patch: Any, options: dict[str, Any], variables: dict[int, Variable]) -> Callable[..., Any] | None:
        """See :class:`RoutedPatch`."""
        if getattr(patch, "__module__", None) != _MODULE:
            return None
        reference = ShippedPatch.of(patch, variables, scratch=_VARIABLE)
        kind = RecordedAttention if _UNCOND in options.get("cond_or_uncond", ()) else Attention
        return reference and kind(reference)

    def runs_in(self, network: nn.Module) -> bool:
        """Whether ``network`` has the attention that the node means, and calls it once."""
        has_middle = type(network) is UNetModel and network.middle_block is not None and len(network.middle_block) > 1
        return has_middle and type(network.middle_block[1]) is SpatialTransformer

    def identity(self, patcher: ModelPatcher) -> bool:
        """See :class:`RoutedPatch`."""
        hung = _hung_on(patcher) is not None
        if hung and is_compiled(patcher):
            raise UnsupportedModelError("it is compiled (torch.compile), and Self-Attention Guidance reads values inside it")
        return hung

    def build(self, network: nn.Module, patcher: ModelPatcher) -> nn.Module:
        """See :class:`RoutedPatch`."""
        return guided(network) if _hung_on(patcher) else network

    def begin(self, patcher: ModelPatcher) -> PatchInSampling | None:
        """See :class:`RoutedPatch`."""
        return _Guidance() if _hung_on(patcher) else None


class _Guidance(PatchInSampling):
    def after(self, call: RoutedCall, result: Any) -> Any:
        """Tell the node's own patch what it would have seen."""
        if not isinstance(result, tuple):
            return result
        output, scores = result
        prompts, patch = call.options["cond_or_uncond"], _patch_of(call.options)
        own = scores.tensor_split(len(prompts))[prompts.index(_UNCOND)]
        patch.__closure__[patch.__code__.co_freevars.index(_VARIABLE)].cell_contents = own
        return output
