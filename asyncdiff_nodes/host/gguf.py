"""The layer classes of ComfyUI-GGUF, which a rank takes from where the pack is installed. Ranks import this, too."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

_OPTIONS = ("dequant_dtype", "patch_dtype")  # what the pack's loader sets on its class


@dataclass(frozen=True)
class GGUF:
    """The pack's operations; see :class:`~.quantised.Operations`.

    Attributes:
        module: name that the pack's module of layers has in ComfyUI's process.
        folder: where the pack is installed.
        options: what its loader was set to.
    """

    module: str
    folder: str
    options: tuple[Any, ...]
    patched = False

    @classmethod
    def of(cls, patcher: ModelPatcher) -> GGUF | None:
        """Those of the model; None if it has others."""
        made = type(patcher.model.model_config.custom_operations)
        module = sys.modules[made.__module__]
        if made.__qualname__ != "GGMLOps" or not hasattr(module, "GGMLTensor"):
            return None
        folder = module.__file__.replace("\\", "/").rpartition("/")[0]
        return cls(module.__name__, folder, tuple(getattr(made.Linear, name) for name in _OPTIONS))

    def classes(self) -> type:
        """The pack's own class. In a rank the module is imported under its name here, without the nodes of the pack."""
        if self.module not in sys.modules:
            package = self.module.rpartition(".")[0]
            spec = ModuleSpec(package, None, is_package=True)
            spec.submodule_search_locations.append(self.folder)
            sys.modules[package] = module_from_spec(spec)
            made = importlib.import_module(self.module).GGMLOps
            for name, value in zip(_OPTIONS, self.options, strict=True):
                setattr(made.Linear, name, value)
        return sys.modules[self.module].GGMLOps

    def state(self, layer: nn.Module) -> dict[str, torch.Tensor]:
        """Its weights; those in the state dict are for the host's estimate of memory."""
        return {name: weight.to("meta") for name, weight in layer.named_parameters(recurse=False)}

    def pieces(self, weight: torch.Tensor) -> tuple[Any, dict[str, torch.Tensor]] | None:
        """The bytes of the file."""
        if not isinstance(weight, sys.modules[self.module].GGMLTensor):
            return None
        return (weight.tensor_type, tuple(weight.tensor_shape)), {"data": weight.as_subclass(torch.Tensor)}

    def whole(self, settings: Any, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The pack's tensor of these bytes."""
        kind, shape = settings
        return sys.modules[self.module].GGMLTensor(tensors["data"], tensor_type=kind, tensor_shape=torch.Size(shape))
