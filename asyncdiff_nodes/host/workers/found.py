"""How networks are split that no table lists, as it was found out from calls of them in this session."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from asyncdiff_nodes.engine import Family
from asyncdiff_nodes.engine.batch import Arguments
from asyncdiff_nodes.engine.planning.discovery import Place, discover
from asyncdiff_nodes.engine.planning.family import listed_family
from asyncdiff_nodes.host.attributes import replaced

from .divide import divide

# fingerprint of a network -> modules that some of its calls run more than once
_avoided: defaultdict[str, set[str]] = defaultdict(set)


def avoid(fingerprint: str, block: str) -> None:
    """Note that networks with this fingerprint may run ``block`` more than once in a call, so that it must not be a block."""
    _avoided[fingerprint].add(block)


def family_of(
    skeleton: nn.Module, patcher: ModelPatcher, fingerprint: str, entry: str, places: tuple[Place, Place] | None, call: Arguments
) -> Family:
    """The family of ``skeleton``, the network of ``patcher``: how to split it, trace it, and divide its calls.

    Args:
        entry, places, call: of its first call: the method, where latent and timestep are, and its arguments.

    Raises:
        UnsupportedModelError: its class is not listed, and it is found out that it cannot be split.
    """
    family = listed_family(skeleton)
    if family is None:
        own = entry if type(skeleton) is type(patcher.model.diffusion_model) else "forward"
        how = {"entry": own, "places": places, "prepare": _traceable, "tracing": _tracing}
        family, _ = discover(skeleton, *call, **how, avoid=_avoided[fingerprint])
    return replace(family, trace_inputs=_traceable, tracing=_tracing, divide=divide)


def _traceable(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of a call with an attention, and patches, that run on the meta device.

    Some of the host's attentions call kernels that do not, and some patches read the step.
    """

    def attention(_: Any, *args: Any, **kwargs: Any) -> Any:
        return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)

    options = {**(kwargs.get("transformer_options") or {}), "optimized_attention_override": attention}
    options["patches_replace"] = {
        place: {where: getattr(patch, "traced", patch) for where, patch in patches.items()}
        for place, patches in options.get("patches_replace", {}).items()
    }
    return args, {**kwargs, "transformer_options": options}


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    """Tell the host that the meta device has much free memory: its attention asks, where no other can be put in its place."""
    its_own = comfy.model_management.get_free_memory

    def get_free_memory(device: Any = None, torch_free_too: bool = False) -> Any:
        if not isinstance(device, torch.device) or device.type != "meta":
            return its_own(device, torch_free_too)
        return (2**40, 2**40) if torch_free_too else 2**40

    with replaced(comfy.model_management, "get_free_memory", get_free_memory):
        yield
