"""The loaded network without its weights, in a form that a worker process can rebuild."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_detection
import torch
from comfy.cldm import cldm
from comfy.model_patcher import ModelPatcher
from torch import nn
from torch.utils._pytree import tree_map

from asyncdiff_nodes.engine import Family, UnsupportedModelError, find_family
from asyncdiff_nodes.engine.planning.graph import tensors_of
from asyncdiff_nodes.host.attributes import layers_with_weights
from asyncdiff_nodes.host.controlnet.configs import on_meta
from asyncdiff_nodes.host.controlnet.network import controlled
from asyncdiff_nodes.host.patches import sag
from asyncdiff_nodes.host.patches.animatediff.calls import motion_models, motion_sources
from asyncdiff_nodes.host.patches.animatediff.network import MotionSource, animated
from asyncdiff_nodes.host.patches.compiled import compile_arguments
from asyncdiff_nodes.host.patches.foreign_code import foreign_classes, functions_of
from asyncdiff_nodes.host.routing.divide import divide

from . import quantised
from .quantised import Operations
from .weights import originals_of, patches_of, reshaped


def check(patcher: ModelPatcher) -> None:
    """Raises UnsupportedModelError where others have put code or shapes on the network of ``patcher`` that a rank cannot have."""
    live = patcher.model.diffusion_model
    find_family(live)
    if code := foreign_classes(live):
        raise UnsupportedModelError(f"its {type(live).__name__} runs code of others: {', '.join(code[:3])}")
    if wide := reshaped(patcher):
        raise UnsupportedModelError(f"a patch, such as a LoRA with inputs of its own, changes the shape of {', '.join(wide[:3])}")


def skeleton_of(patcher: ModelPatcher, nets: Sequence[nn.Module] = ()) -> nn.Module:
    """The diffusion model of ``patcher`` on the meta device, and with it the networks of ControlNets, if there are ``nets``.

    It is built anew from the host's own configuration, because the live one carries what the host's loader hangs on it
    (casting functions, streams, pinned memory), and compared with the live one, because other nodes may have rebuilt that.

    Raises:
        UnsupportedModelError: no block list for its class; layers of classes that a rank cannot have, or that apply patches
            themselves; layers, code of layers, or settings that other nodes replaced.
    """
    live = patcher.model.diffusion_model
    find_family(live)
    name = type(live).__name__
    if found := foreign_classes(live):
        raise UnsupportedModelError(f"its {name} runs code of others: {', '.join(found[:3])}")
    if wide := reshaped(patcher):
        raise UnsupportedModelError(f"a patch, such as a LoRA with inputs of its own, changes the shape of {', '.join(wide[:3])}")
    operations = quantised.operations_of(patcher)

    def build(classes: type) -> nn.Module:
        return type(live)(**patcher.model.model_config.unet_config, device="meta", operations=classes)

    rebuilt = _rebuilt(live, build, operations, originals_of(patcher)).requires_grad_(False).eval()
    if patcher.force_cast_weights:  # another node chose the precision of the computation
        for module in rebuilt.modules():
            if hasattr(module, "comfy_cast_weights"):
                module.comfy_cast_weights = module.comfy_force_cast_weights = True
    if operations is not None:
        quantised.take_apart(rebuilt, operations, patches_of(patcher))
    if sources := motion_sources(patcher):
        rebuilt = _animated(rebuilt, sources, patcher)
    elif nets:
        rebuilt = controlled(rebuilt, [net_skeleton(net, patcher) for net in nets])
    return sag.guided(rebuilt) if _guide(patcher) else rebuilt


def _guide(patcher: ModelPatcher) -> Callable[..., Any] | None:
    """The patch of Self-Attention Guidance that hangs on the model of ``patcher``."""
    return sag.patch_of(patcher.model_options.get("transformer_options", {}))


def _animated(rebuilt: nn.Module, sources: Sequence[MotionSource], patcher: ModelPatcher) -> nn.Module:
    try:
        network = animated(rebuilt, sources)
    except Exception as error:
        raise UnsupportedModelError(f"its motion model could not be rebuilt ({error})") from error
    for ours, theirs in zip(network.motion, motion_models(patcher), strict=True):
        _compare(ours, theirs.model, "its file says")
    return network


def net_skeleton(net: nn.Module, patcher: ModelPatcher) -> nn.Module:
    """The network of a ControlNet for the model of ``patcher`` on the meta device.

    It is built from the configuration of the model, or, where it is a copy of another, from what its weights' names tell.

    Raises:
        UnsupportedModelError: as :func:`skeleton_of`.
    """
    try:
        return _rebuilt(net, functools.partial(on_meta, net, patcher.model.model_config.unet_config))
    except UnsupportedModelError:
        told = comfy.model_detection.model_config_from_unet(dict(tensors_of(net)), "", True)
        if told is None:
            raise
        return _rebuilt(net, functools.partial(on_meta, net, told.unet_config))


def _rebuilt(
    live: nn.Module,
    build: Callable[[type], nn.Module],
    operations: Operations | None = None,
    originals: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> nn.Module:
    """What ``build`` makes with the layer classes of ``live``, if that is the same network. Raises as :func:`skeleton_of`.

    Args:
        operations: how to get at these classes, if they cannot be imported.
        originals: see :func:`~.weights.originals_of`.
    """
    name, classes = type(live).__name__, _classes_of(live, operations)
    try:
        with layers_with_weights():
            rebuilt = build(classes)
        for layer, state in quantised.states(live, operations) if operations else ():
            rebuilt.get_submodule(layer).load_state_dict(state, assign=True)
    except Exception as error:
        raise UnsupportedModelError(f"its {name} could not be rebuilt from the host's configuration ({error})") from error
    says = "the host's configuration says"
    _compare(rebuilt, live, says, originals)
    ours, theirs = _settings(rebuilt), _settings(live)
    both = ours.keys() & theirs.keys()  # some are only there once a network was used
    _refuse_others(live, "settings", says, {name: ours[name] for name in both}, {name: theirs[name] for name in both})
    return rebuilt


def _compare(
    rebuilt: nn.Module, live: nn.Module, says: str, originals: Mapping[str, torch.Tensor] = MappingProxyType({})
) -> None:
    """Raises as :func:`skeleton_of` if they are not the same network, the live one with its ``originals``."""
    for what, describe in (("layers", _classes), ("weights", _shapes), ("code", functions_of), ("attention heads", _heads)):
        theirs = describe(live)
        if describe is _shapes:
            theirs |= {name: tuple(tensor.shape) for name, tensor in originals.items()}
        _refuse_others(live, what, says, describe(rebuilt), theirs)


def _refuse_others(live: nn.Module, what: str, says: str, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    if changed := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
        raise UnsupportedModelError(f"its {type(live).__name__} has other {what} than {says}: {', '.join(changed[:3])}")


def description_of(patcher: ModelPatcher) -> tuple[Any, ...]:
    """Equal as long as nobody changes the network of ``patcher``, but for weights' values: what is compared with a skeleton."""
    live = patcher.model.diffusion_model
    shapes = _shapes(live) | {name: tuple(tensor.shape) for name, tensor in originals_of(patcher).items()}
    return _classes(live), shapes, functions_of(live), _settings(live)


def fingerprint_of(patcher: ModelPatcher) -> str:
    """Equal for models whose networks differ in their weights only.

    Raises:
        UnsupportedModelError: no block list for its class; layers of classes that a rank cannot have; see also
            :func:`~.compiled.compile_arguments`.
    """
    live = patcher.model.diffusion_model
    find_family(live)
    config = sorted(patcher.model.model_config.unet_config.items(), key=str)
    operations = quantised.operations_of(patcher)
    classes = _classes_of(live, operations)
    layers = (operations, quantised.outline(live, operations, patches_of(patcher))) if operations else classes
    compiled, is_guided = compile_arguments(patcher), _guide(patcher) is not None
    if compiled is not None and is_guided:
        raise UnsupportedModelError("it is compiled (torch.compile), and Self-Attention Guidance looks into it")
    return repr((type(live), layers, patcher.force_cast_weights, config, compiled, is_guided, *motion_sources(patcher)))


def outline_of(net: nn.Module) -> Any:
    """Equal for ControlNets whose networks differ in their weights only, whether these are on the meta device or not."""
    return _classes_of(net), net.dtype, _classes(net), _shapes(net), _heads(net)


def family_of(skeleton: nn.Module, patcher: ModelPatcher) -> Family:
    """How to split ``skeleton``, the network of ``patcher``, how to trace it, and how to divide its calls."""
    family = find_family(skeleton)
    dtype = patcher.get_model_object("manual_cast_dtype") or skeleton.dtype  # of calls, whatever that of the weights
    guide = _guide(patcher)
    options = sag.example_options(guide) if guide else {}

    def example_inputs(*args: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def cast(leaf: Any) -> Any:
            return leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.dtype == skeleton.dtype else leaf

        args, kwargs = tree_map(cast, family.example_inputs(*args))
        return args, {**kwargs, "transformer_options": options}

    return replace(family, example_inputs=example_inputs, trace_inputs=_traceable, divide=divide)


def _traceable(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of a call with an attention, and patches, that run on the meta device.

    Some of the host's attentions look at a device's free memory, and some patches at what step it is.
    """

    def attention(_: Any, *args: Any, **kwargs: Any) -> Any:
        return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)

    options = {**kwargs["transformer_options"], "optimized_attention_override": attention}
    options["patches_replace"] = {
        place: {where: getattr(patch, "traced", patch) for where, patch in patches.items()}
        for place, patches in options.get("patches_replace", {}).items()
    }
    return args, {**kwargs, "transformer_options": options}


def _classes_of(live: nn.Module, operations: Operations | None = None) -> type:
    """The host's class of layer classes that ``live`` was built with, such as ``comfy.ops.manual_cast``.

    Raises:
        UnsupportedModelError: layers of classes that neither can be imported nor are of ``operations``.
    """
    name, found = type(live).__name__, None
    for cls in map(type, live.modules()):
        if quantised.made_by(operations, cls):
            continue
        if type(live) is cldm.ControlNet and cls.__module__ == cldm.__name__:
            continue  # union ones have a class within a function, but pickle as what they are built of
        # packs are loaded under path-like names
        if "<locals>" in cls.__qualname__ or not all(part.isidentifier() for part in cls.__module__.split(".")):
            raise UnsupportedModelError(
                f"its {name} has layers of the class {cls.__qualname__} from {cls.__module__}, "
                "as quantised models do; a worker process cannot rebuild these"
            )
        outer, _, inner = cls.__qualname__.rpartition(".")
        if outer and inner == "Linear" and found is None:
            found = getattr(sys.modules[cls.__module__], outer)
    if operations is not None:
        return operations.classes()
    if found is None:
        raise UnsupportedModelError(f"its {name} has no linear layer of the host's own classes")
    return found


def _classes(module: nn.Module) -> dict[str, tuple[str, str]]:
    """By name, since a class within a function is another one each time."""
    return {name: (type(child).__module__, type(child).__qualname__) for name, child in module.named_modules() if name}


def _shapes(module: nn.Module) -> dict[str, Any]:
    return {name: tuple(tensor.shape) for name, tensor in tensors_of(module)}


def _heads(module: nn.Module) -> dict[str, Any]:
    """Which no weight tells."""
    return {name: value for name, value in _settings(module).items() if name.endswith(".heads")}


def _settings(module: nn.Module) -> dict[str, Any]:
    """Numbers and the like that layers are set to; not those of the host's loader, or of training."""
    kinds = bool | int | float | str | tuple | torch.dtype
    return {
        f"{name}.{attribute}": value
        for name, child in module.named_modules()
        for attribute, value in vars(child).items()
        if isinstance(value, kinds) and attribute != "training" and "comfy" not in attribute
    }
