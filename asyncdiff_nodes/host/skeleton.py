"""The loaded network without its weights, in a form that a worker process can rebuild."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import comfy.ldm.modules.attention
from comfy.model_patcher import ModelPatcher
from torch import nn

from asyncdiff_nodes.engine import Family, UnsupportedModelError, find_family
from asyncdiff_nodes.engine.graph import tensors_of

from .parts import divide


def skeleton_of(patcher: ModelPatcher) -> nn.Module:
    """The diffusion model of ``patcher`` on the meta device.

    It is built anew from the host's own configuration, because the live one carries what the host's loader hangs on it
    (casting functions, streams, pinned memory), and compared with the live one, because other nodes may have rebuilt that.

    Raises:
        UnsupportedModelError: no block list for its class; quantised layers; layers that other nodes replaced.
    """
    live = patcher.model.diffusion_model
    find_family(live)
    name = type(live).__name__
    for module in live.modules():
        cls = type(module)
        if "<locals>" in cls.__qualname__ or not all(part.isidentifier() for part in cls.__module__.split(".")):
            raise UnsupportedModelError(
                f"its {name} has layers of the class {cls.__qualname__} from {cls.__module__}, as quantised models do; "
                "a worker process cannot rebuild these"
            )
    config = patcher.model.model_config.unet_config
    try:
        rebuilt = type(live)(**config, device="meta", operations=_operations(live)).requires_grad_(False).eval()
    except Exception as error:
        raise UnsupportedModelError(f"its {name} could not be rebuilt from the host's configuration ({error})") from error
    for what, describe in (("layers", _classes), ("weights", _shapes)):
        ours, theirs = describe(rebuilt), describe(live)
        if ours != theirs:
            changed = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
            raise UnsupportedModelError(
                f"its {name} has other {what} than the host's configuration says: {', '.join(changed[:3])}"
            )
    if patcher.force_cast_weights:  # another node chose the precision of the computation
        for module in rebuilt.modules():
            if hasattr(module, "comfy_cast_weights"):
                module.comfy_cast_weights = True
    return rebuilt


def fingerprint_of(patcher: ModelPatcher) -> str:
    """Equal for models whose networks differ in their weights only."""
    live = patcher.model.diffusion_model
    config = sorted(patcher.model.model_config.unet_config.items(), key=str)
    return repr((type(live), _operations(live), patcher.force_cast_weights, config))


def family_of(skeleton: nn.Module) -> Family:
    """How to split ``skeleton``, how to trace it, and how to divide its calls."""
    return replace(find_family(skeleton), trace_inputs=_traceable, divide=divide)


def _traceable(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of a call with an attention that runs on the meta device: some of the host's look at a device's free memory."""

    def attention(_: Any, *args: Any, **kwargs: Any) -> Any:
        return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)

    options = {**kwargs["transformer_options"], "optimized_attention_override": attention}
    return args, {**kwargs, "transformer_options": options}


def _operations(live: nn.Module) -> type:
    """The host's class of layer classes that ``live`` was built with, such as ``comfy.ops.manual_cast``."""
    for module in live.modules():
        outer, _, inner = type(module).__qualname__.rpartition(".")
        if outer and inner == "Linear":
            return getattr(sys.modules[type(module).__module__], outer)
    raise UnsupportedModelError(f"its {type(live).__name__} has no linear layer of the host's own classes")


def _classes(module: nn.Module) -> dict[str, type]:
    return {name: type(child) for name, child in module.named_modules()}


def _shapes(module: nn.Module) -> dict[str, Any]:
    return {name: tuple(tensor.shape) for name, tensor in tensors_of(module)}
