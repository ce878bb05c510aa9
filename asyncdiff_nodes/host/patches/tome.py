"""Token merging (ToMe): ranks are sent the random numbers that its patches draw, as one generator is the host's for all blocks.

Nothing of the host is imported here: a rank has not its flags yet when it imports this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .by_reference import ShippedPatch

NUMBERS = "asyncdiff_random_numbers"  # in the options of a call: place of an attention -> those drawn there
_MODULE = "comfy_extras.nodes_tomesd"
_KIND = "attn1_patch"  # of the patch that draws

Place = tuple[str, int, int]  # of an attention: list of blocks, block, layer of its transformer


@dataclass(frozen=True)
class Merging:
    """A patch of the node by reference."""

    patch: ShippedPatch

    @classmethod
    def of(cls, patch: ShippedPatch) -> Merging | None:
        """What stands for ``patch``; None if it is another node's."""
        return cls(patch) if patch.module == _MODULE else None

    @staticmethod
    def runs_in(network: nn.Module) -> bool:
        """Whether it is known where in ``network`` tokens are merged."""
        from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

        return type(network) is UNetModel

    def __call__(self, *args: Any) -> Any:
        """Run the patch, whose last argument is the options of the call."""
        numbers = args[-1][NUMBERS].get(_place(args[-1]))

        def draw(*_: Any, **__: Any) -> torch.Tensor:
            if numbers is None:
                raise RuntimeError(f"tokens are merged in the block {_place(args[-1])}, where that was not foreseen")
            return numbers

        with _Drawing(draw):
            return self.patch(*args)


class _Drawing(TorchFunctionMode):
    """While it lasts, ``draw`` is called in place of ``torch.randint``."""

    def __init__(self, draw: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._draw = draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self._draw if func is torch.randint else func)(*args, **(kwargs or {}))


class _Asked(Exception):
    """For random numbers, with these arguments."""


def random_numbers(network: nn.Module, shipped: dict[str, Any], x: torch.Tensor) -> dict[str, Any]:
    """What to add to the ``shipped`` options of a call of ``network``, the host's, with the latent ``x`` [B, C, h, w].

    They are drawn as the patches would, block after block, from the generator of the latent's device.
    """
    patch = next((patch for patch in shipped.get("patches", {}).get(_KIND, ()) if isinstance(patch, Merging)), None)
    if patch is None:
        return {}
    asked = _asked(patch.patch, x)
    places = _of_full_resolution(network) if asked else ()
    return {NUMBERS: {place: torch.randint(*asked[0], **{**asked[1], "device": x.device}) for place in places}}


def _asked(patch: ShippedPatch, x: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments with which ``patch`` draws random numbers for an attention to as many tokens as ``x`` has pixels."""
    tokens = torch.empty(1, x.shape[2] * x.shape[3], 1, device="meta")

    def ask(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise _Asked(args, kwargs)

    try:
        with _Drawing(ask):
            patch(tokens, tokens, tokens, {"original_shape": list(x.shape)})
    except _Asked as asked:
        return asked.args
    return None


def _of_full_resolution(network: nn.Module) -> Iterator[Place]:
    """The attentions to as many tokens as the latent has pixels: there alone tokens are merged. In the order of execution."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample

    def lowers(group: nn.Module) -> bool:
        return any(isinstance(module, Downsample) for module in group.modules())

    groups = len(network.input_blocks)
    full = next((index for index, group in enumerate(network.input_blocks) if lowers(group)), groups)
    for kind, indices in (("input", range(full)), ("output", range(groups - full, groups))):
        for index in indices:
            for layer in getattr(network, f"{kind}_blocks")[index]:
                for depth in range(len(getattr(layer, "transformer_blocks", ()))):
                    yield kind, index, depth


def _place(options: dict[str, Any]) -> Place:
    return (*options["block"], options["block_index"])
