"""The layer classes of ComfyUI-GGUF, which a rank imports from the pack's folder. Ranks import this module too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from asyncdiff_nodes.host.patches.packs import PackModule

from . import lora

_OPTIONS = ("dequant_dtype", "patch_dtype")  # what the pack's loader sets on its class


@dataclass(frozen=True)
class GGUF:
    """The pack's operations; see :class:`~.quantised.Operations`.

    Attributes:
        source: the pack's module of layers.
        options: the settings of its loader.
    """

    source: PackModule
    options: tuple[Any, ...]
    patch_dtype = torch.float32

    @classmethod
    def of(cls, patcher: ModelPatcher) -> GGUF | None:
        """The operations of the model; None if it has others."""
        made = type(patcher.model.model_config.custom_operations)
        source = PackModule.of(made)
        if made.__qualname__ != "GGMLOps" or source is None or not hasattr(source.load(), "GGMLTensor"):
            return None
        return cls(source, tuple(getattr(made.Linear, name) for name in _OPTIONS))

    def classes(self) -> type:
        """The pack's own class. A rank sets the loader's options again, as its process may have served another model."""
        made = self.source.load().GGMLOps
        if not self.source.of_host:
            for name, value in zip(_OPTIONS, self.options, strict=True):
                setattr(made.Linear, name, value)
        return made

    def state(self, layer: nn.Module) -> dict[str, torch.Tensor]:
        """The weights of ``layer``; its state dict is only for the host's estimate of memory."""
        return {name: weight.to("meta") for name, weight in layer.named_parameters(recurse=False)}

    def carries(self, weight: torch.Tensor) -> bool:
        """Whether ``weight`` is quantised, since it carries its patches then."""
        pack = self.source.load()
        return isinstance(weight, pack.GGMLTensor) and pack.is_quantized(weight)

    def pieces(self, weight: torch.Tensor, patches: Sequence[Any] = ()) -> tuple[Any, dict[str, torch.Tensor]] | None:
        """The bytes in the file, and the patches as tensors."""
        if not isinstance(weight, self.source.load().GGMLTensor):
            return None
        carried, tensors = lora.take_apart(patches if self.carries(weight) else ())
        return (weight.tensor_type, tuple(weight.tensor_shape), carried), {"data": weight.as_subclass(torch.Tensor), **tensors}

    def whole(self, settings: Any, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The pack's tensor of these bytes, with these patches."""
        kind, shape, carried = settings
        patches = [(lora.put_together(carried, tensors), "weight")]
        return self.source.load().GGMLTensor(tensors["data"], tensor_type=kind, tensor_shape=torch.Size(shape), patches=patches)
