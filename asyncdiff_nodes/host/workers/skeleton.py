"""The loaded network without its weights, in a form that a worker process can rebuild."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import comfy.model_detection
import torch
from comfy.cldm import cldm
from comfy.model_patcher import ModelPatcher
from torch import nn

from asyncdiff_nodes.engine import UnsupportedModelError
from asyncdiff_nodes.engine.planning.family import listed_family
from asyncdiff_nodes.engine.planning.on_meta import on_meta
from asyncdiff_nodes.engine.tensors import tensors_of
from asyncdiff_nodes.host.attributes import layers_with_weights
from asyncdiff_nodes.host.choices import FOUND
from asyncdiff_nodes.host.controlnet.configs import on_meta as net_on_meta
from asyncdiff_nodes.host.controlnet.network import controlled
from asyncdiff_nodes.host.page.settings import setting
from asyncdiff_nodes.host.patches.foreign_code import foreign_classes, functions_of
from asyncdiff_nodes.host.patches.packs import PackModule
from asyncdiff_nodes.host.patches.registry import KINDS

from . import quantised
from .comparison import classes_of, compare, heads_of, refuse_others, settings_of, shapes_of
from .quantised import Operations
from .weights import originals_of, patches_of, reshaped


def check(patcher: ModelPatcher) -> None:
    """Raise UnsupportedModelError if nodes gave the network of ``patcher`` code or shapes that a rank cannot have."""
    live = patcher.model.diffusion_model
    if setting("Unlisted") != FOUND and listed_family(live) is None:
        raise UnsupportedModelError(
            f"no block list for its {type(live).__name__}, and Settings, AsyncDiff, Unlisted asks for one"
        )
    if code := foreign_classes(live):
        raise UnsupportedModelError(f"its {type(live).__name__} runs code of other packs: {', '.join(code[:3])}")
    if wide := reshaped(patcher):
        raise UnsupportedModelError(f"a patch, such as a LoRA with inputs of its own, changes the shape of {', '.join(wide[:3])}")


def skeleton_of(patcher: ModelPatcher, nets: Sequence[nn.Module] = ()) -> nn.Module:
    """The diffusion model of ``patcher`` on the meta device, and with it the networks of ControlNets, if there are ``nets``.

    It is built from the host's own configuration, because the live one has additions of the host's loader (casting functions,
    streams, pinned memory). Then it is compared with the live one, because other nodes may have rebuilt that.

    Raises:
        UnsupportedModelError: no block list for its class; layers of classes that a rank cannot have, or that apply patches
            themselves; layers, code of layers, or settings that other nodes replaced.
    """
    check(patcher)
    live = patcher.model.diffusion_model
    operations = quantised.operations_of(patcher)

    def build(classes: type) -> nn.Module:
        config = patcher.model.model_config
        given = classes if operations is None else config.custom_operations or classes  # GGUF's loader gives an object
        return type(live)(**config.unet_config, device="meta", operations=given)

    rebuilt = _rebuilt(live, build, operations, originals_of(patcher)).requires_grad_(False).eval()
    if patcher.force_cast_weights:  # another node chose the precision of the computation
        for module in rebuilt.modules():
            if hasattr(module, "comfy_cast_weights"):
                module.comfy_cast_weights = module.comfy_force_cast_weights = True
    if operations is not None:
        for module in rebuilt.modules():
            for name in [name for name, value in vars(module).items() if _is_local(value)]:
                delattr(module, name)  # a class that it was built of, which no rank could be sent
        quantised.take_apart(rebuilt, operations, patches_of(patcher))
    if nets:
        rebuilt = controlled(rebuilt, [net_skeleton(net, patcher) for net in nets])
    for kind in KINDS:
        rebuilt = kind.build(rebuilt, patcher)
    return rebuilt


@dataclass(frozen=True)
class ClassOf:
    """A class, by what a rank can find it by: its module's name, or the file of the pack that the host has loaded."""

    pack: PackModule | None
    module: str
    name: str

    @classmethod
    def of(cls, thing: type) -> ClassOf:
        """Describe the class ``thing``."""
        return cls(PackModule.of(thing) if not _has_name(thing) else None, thing.__module__, thing.__qualname__)

    def load(self) -> type:
        """Import it."""
        module = importlib.import_module(self.module) if self.pack is None else self.pack.load()
        found: type = functools.reduce(getattr, self.name.split("."), module)
        return found


@dataclass(frozen=True)
class Recipe:
    """How to build a network in a rank, if it cannot be sent itself: it has local classes or functions, or is a pack's.

    Attributes:
        network, config: the class, and what it is built of.
        layers: the class of its layer classes.
        constants: see :func:`constants_of`.
    """

    network: ClassOf
    config: dict[str, Any]
    layers: type
    constants: Mapping[tuple[str, str], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, skeleton: nn.Module, patcher: ModelPatcher) -> Recipe | None:
        """The recipe of ``skeleton``, the network of ``patcher``; None if it was changed since it was built."""
        live = patcher.model.diffusion_model
        if type(skeleton) is not type(live) or patcher.force_cast_weights or quantised.operations_of(patcher):
            return None
        config = patcher.model.model_config.unet_config
        return cls(ClassOf.of(type(live)), config, _layer_classes_of(live), dict(constants_of(skeleton)))

    def __call__(self) -> nn.Module:
        """Build it on the meta device."""
        with layers_with_weights(), on_meta({}):
            network = self.network.load()(**self.config, device="meta", operations=self.layers)
        for (name, attribute), value in self.constants.items():
            setattr(network.get_submodule(name), attribute, value)
        built: nn.Module = network.requires_grad_(False).eval()
        return built


def constants_of(network: nn.Module) -> Iterator[tuple[tuple[str, str], torch.Tensor]]:
    """Tensors that a network has been made with and that are neither parameters nor buffers: (module, attribute) and value."""
    for name, module in network.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield (name, attribute), value


def net_skeleton(net: nn.Module, patcher: ModelPatcher) -> nn.Module:
    """The network of a ControlNet for the model of ``patcher`` on the meta device.

    It is built from the configuration of the model, or, where it is a copy of another one, from the names of its weights.

    Raises:
        UnsupportedModelError: as :func:`skeleton_of`.
    """
    try:
        return _rebuilt(net, functools.partial(net_on_meta, net, patcher.model.model_config.unet_config))
    except UnsupportedModelError:
        config = comfy.model_detection.model_config_from_unet(dict(tensors_of(net)), "", True)
        if config is None:
            raise
        return _rebuilt(net, functools.partial(net_on_meta, net, config.unet_config))


def _rebuilt(
    live: nn.Module,
    build: Callable[[type], nn.Module],
    operations: Operations | None = None,
    originals: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> nn.Module:
    """Run ``build`` with the layer classes of ``live``, and check that it makes that network. Raises as :func:`skeleton_of`.

    Args:
        operations: access to these classes, if they cannot be imported.
        originals: see :func:`~.weights.originals_of`.
    """
    name, classes = type(live).__name__, _layer_classes_of(live, operations)
    try:
        with layers_with_weights(), on_meta({}):  # some read values of what they build
            rebuilt = build(classes)
        for (module, attribute), _ in list(constants_of(rebuilt)):
            own = getattr(live.get_submodule(module), attribute)
            setattr(rebuilt.get_submodule(module), attribute, own.detach().to("cpu", copy=True))
        for layer, state in quantised.states(live, operations) if operations else ():
            rebuilt.get_submodule(layer).load_state_dict(state, assign=True)
    except Exception as error:
        raise UnsupportedModelError(f"its {name} could not be rebuilt from ComfyUI's configuration ({error})") from error
    says = "ComfyUI's configuration says"
    compare(rebuilt, live, says, originals)
    ours, theirs = settings_of(rebuilt), settings_of(live)
    both = ours.keys() & theirs.keys()  # some are there only once a network was used
    refuse_others(live, "settings", says, {name: ours[name] for name in both}, {name: theirs[name] for name in both})
    return rebuilt


def description_of(patcher: ModelPatcher) -> tuple[Any, ...]:
    """A description that changes with the network of ``patcher``, except for its weights' values; see :func:`.compare`."""
    live = patcher.model.diffusion_model
    shapes = shapes_of(live) | {name: tuple(tensor.shape) for name, tensor in originals_of(patcher).items()}
    return classes_of(live), shapes, functions_of(live), settings_of(live)


def fingerprint_of(patcher: ModelPatcher) -> str:
    """A text that is equal for models whose networks differ only in their weights.

    Raises:
        UnsupportedModelError: no block list for its class; layers of classes, or patches, that a rank cannot have.
    """
    live = patcher.model.diffusion_model
    config = sorted(patcher.model.model_config.unet_config.items(), key=str)
    operations = quantised.operations_of(patcher)
    classes = _layer_classes_of(live, operations)
    layers = (operations, quantised.outline(live, operations, patches_of(patcher))) if operations else classes
    patches = [kind.identity(patcher) for kind in KINDS]
    return repr((type(live), layers, patcher.force_cast_weights, config, patches))


def outline_of(net: nn.Module) -> Any:
    """A value that is equal for ControlNets that differ only in their weights, whether on the meta device or not."""
    return _layer_classes_of(net), net.dtype, classes_of(net), shapes_of(net), heads_of(net)


def _layer_classes_of(live: nn.Module, operations: Operations | None = None) -> type:
    """The host's class of layer classes that ``live`` was built with, such as ``comfy.ops.manual_cast``.

    Raises:
        UnsupportedModelError: a layer's class can neither be imported nor belongs to ``operations``.
    """
    name, outer_class = type(live).__name__, None
    for cls in map(type, live.modules()):
        if quantised.made_by(operations, cls):
            continue
        if type(live) is cldm.ControlNet and cls.__module__ == cldm.__name__:
            continue  # union ControlNets have a class made in a function, but pickle as their configuration
        local = _is_local(cls)
        if local and cls.__module__.startswith("comfy.ldm."):
            continue  # the rank builds them by its recipe
        if local or not (_has_name(cls) or PackModule.of(cls)):
            raise UnsupportedModelError(
                f"its {name} has layers of the class {cls.__qualname__} from {cls.__module__}, "
                "as quantised models do; a worker process cannot rebuild these"
            )
        outer, _, inner = cls.__qualname__.rpartition(".")
        if outer and inner == "Linear" and outer_class is None:
            outer_class = getattr(sys.modules[cls.__module__], outer)
    if operations is not None:
        return operations.classes()
    if outer_class is None:
        raise UnsupportedModelError(f"its {name} has no linear layer of ComfyUI's own classes")
    return outer_class


def _is_local(value: Any) -> bool:
    """Whether it is a class that was made within a function."""
    return isinstance(value, type) and "<locals>" in value.__qualname__


def _has_name(cls: type) -> bool:
    """Whether a class can be imported by the name of its module: packs are loaded under path-like names."""
    return all(part.isidentifier() for part in cls.__module__.split("."))
